"""Random trees of the files that people have: every one is shown as a user would expect, or skipped, counted, named."""

import io
import logging
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.core.decoding import UNREADABLE, open_image
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.folders import ImageFolder

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".gif": "GIF"}
SIZE = (8, 12)


def encoded(image, suffix, **options):
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[suffix], **options)
    return buffer.getvalue()


def grey16(rng, height, width):
    return encoded(Image.fromarray(rng.integers(0, 65536, (height, width)).astype(np.uint16)), ".png")


def coloured(mode):
    def make(rng, height, width):
        values = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        suffix = {"P": ".gif", "CMYK": ".jpg", "LA": ".png", "RGBA": ".webp", "1": ".tif"}.get(mode, ".png")
        if mode in ("LA", "RGBA"):
            alpha = Image.fromarray(rng.integers(0, 256, (height, width)).astype(np.uint8))
            image = Image.fromarray(values).convert(mode)
            image.putalpha(alpha)
            return encoded(image, suffix)
        return encoded(Image.fromarray(values).convert(mode), suffix)

    return make


KINDS = {mode: coloured(mode) for mode in ("L", "RGB", "RGBA", "LA", "P", "CMYK", "1")} | {"grey16": grey16}


def damaged(content, rng):
    """Cut a file off, overwrite a stretch, or empty it."""
    kind = rng.integers(4)
    if kind == 0:
        return content[: int(rng.integers(1, max(2, len(content) // 2)))]
    if kind == 1:
        start = int(rng.integers(len(content) // 2))
        return content[:start] + rng.bytes(20) + content[start + 20 :]
    return b"" if kind == 2 else rng.bytes(int(rng.integers(1, 200)))


def write_tree(root, rng, num=14):
    """Write files of all kinds below a few folders; return those that are whole, by name."""
    whole = {}
    for i in range(num):
        kind = list(KINDS)[int(rng.integers(len(KINDS)))]
        content = KINDS[kind](rng, *(int(side) for side in rng.integers(1, 40, 2)))
        is_damaged = rng.random() < 0.3
        name = f"{'abc'[int(rng.integers(3))]}/{i:02} {kind}.png"  # endings tell nothing about the content
        path = root / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(damaged(content, rng) if is_damaged else content)
        if not is_damaged:
            whole[name] = content
    return whole


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_every_file_is_shown_or_skipped_and_named(tmp_path, caplog, seed, channels):
    rng = np.random.default_rng(seed)
    whole = write_tree(tmp_path, rng)
    dataset = ImageFolder(tmp_path, list(SIZE), crop="random", flip=0.5, channels=channels)
    with caplog.at_level(logging.WARNING):
        items = [dataset[i] for i in range(len(dataset))]
    for item in items:
        assert item["image"].shape == (channels, *SIZE) and torch.isfinite(item["image"]).all()
        assert item["image"].abs().max() <= 1
    skipped = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(skipped) == dataset.errors.num_unreadable
    assert not [message for message in skipped for name in whole if message.startswith(name)]


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "grey16"])
def test_what_is_shown_is_what_the_file_says(mode):
    """Check against arithmetic on the decoded values: greys repeated, transparency over white, 16 bits unrounded."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        height, width = (int(side) for side in rng.integers(1, 30, 2))
        content = KINDS[mode](rng, height, width)
        with Image.open(io.BytesIO(content)) as opened:
            values = np.asarray(opened, np.float64)
        if mode == "grey16":
            want = values * 255 / 65535
        elif mode in ("LA", "RGBA"):
            alpha = values[..., -1:] / 255
            want = values[..., :-1] * alpha + 255 * (1 - alpha)
            want = want if mode == "RGBA" else want.repeat(3, axis=-1)
        else:
            want = values
        got = np.asarray(open_image(content), np.float64)
        assert np.abs(got - want).max() <= (1e-4 if mode in ("grey16", "L", "RGB") else 1.5)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", FORMATS)
def test_no_damage_raises_anything_else(suffix):
    rng = np.random.default_rng(zlib.crc32(suffix.encode()))
    content = encoded(Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)), suffix)
    for _ in range(150):
        broken = damaged(content, rng)
        for channels in (3, 5):
            try:
                assert open_image(broken, channels).width > 0
            except UNREADABLE:
                continue


def test_no_damage_of_arrays_raises_anything_else():
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    np.save(buffer, rng.integers(0, 255, (9, 7, 5)).astype(np.uint8))
    for _ in range(300):
        try:
            assert open_image(damaged(buffer.getvalue(), rng), 5).width > 0
        except UNREADABLE:
            continue


def test_empty_captions_are_kept_counted_and_the_first_is_named(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for i, text in enumerate(["a cat", "", "  \n", "a dog"]):
        (tmp_path / f"{i}.png").write_bytes(KINDS["RGB"](rng, 9, 9))
        (tmp_path / f"{i}.txt").write_text(text)
    dataset = CaptionedFolder(tmp_path, 8)
    with caplog.at_level(logging.WARNING):
        assert [dataset[i]["caption"] for i in (0, 1, 2, 3, 1)] == ["a cat", "", "", "a dog", ""]
    assert dataset.errors.num_empty == 2
    assert [record.getMessage() for record in caplog.records if "empty" in record.getMessage()] == [
        "1.png: its caption is empty; such images train the model without condition"
    ]


def test_a_caption_that_is_no_text_is_skipped_and_named(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(KINDS["RGB"](rng, 9, 9))
        (tmp_path / f"{i}.txt").write_bytes(b"caf\xe9" if i else "café".encode())
    dataset = CaptionedFolder(tmp_path, 8)
    with caplog.at_level(logging.WARNING):
        assert [item["caption"] for item in dataset] == ["café", "café"]
    assert "1.png cannot be read and is skipped" in caplog.text
