"""What is wrong with data on a disk: every kind, in every kind of reader, is skipped and counted, up to a limit."""

import contextlib
import io
import logging
import struct
import zlib

import numpy as np
import pytest
from picture_files import pixels, png, write_tar
from PIL import Image

from ldm.data.core.module import DataModule
from ldm.data.core.transforms import UNREADABLE
from ldm.data.image_pairs.paired_files import read_hole, read_indices
from ldm.data.image_pairs.super_resolution import LowRes
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.folders import ImageFolder
from ldm.data.shards.shards import IndexedShards, Shards
from ldm.errors import UserError

COUNT, BAD = 30, (4, 11, 17)


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, 64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()


def huge_png():
    """A valid header that declares 100,000 x 100,000 pixels, and hardly any of them."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def huge_array():
    """The header of an array of 3 TB."""
    buffer = io.BytesIO()
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 3), }"
    buffer.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + bytes(99))
    return buffer.getvalue()


# Each kind of damage -> the members of a sample that it replaces; None for a member that is missing.
KINDS = {
    "truncated JPEG": {"png": jpeg()[:-400]},
    "truncated PNG": {"png": png(pixels(0))[:-200]},
    "wrong suffix": {"png": b"<html>404 not found</html>"},
    "zero bytes": {"png": b""},
    "huge dimensions": {"png": huge_png()},
    "huge array": {"png": huge_array()},
    "bad UTF-8 caption": {"txt": b"caf\xe9 \xff"},
    "missing picture": {"png": None},
    "missing caption": {"txt": None},
}
IMAGE_EXTENSIONS = [kind for kind, files in KINDS.items() if "png" in files]


def write_files(folder, damage):
    for i in range(COUNT):
        files = {"png": png(pixels(i)), "txt": f"picture {i}".encode(), **(damage if i in BAD else {})}
        for extension, content in files.items():
            path = folder / f"{i:04d}.{extension}"
            path.write_bytes(content or b"")
            if content is None:
                path.unlink()


def make_folder(folder, damage):
    write_files(folder, {**damage, "png": damage["png"] or b""})
    dataset = ImageFolder(folder, 8)
    _delete_again(folder, damage)
    return dataset


def make_captions(folder, damage):
    write_files(folder, {**damage, "png": damage.get("png", png(pixels(0))) or b""})
    dataset = CaptionedFolder(folder, 8)
    _delete_again(folder, damage)
    return dataset


def _delete_again(folder, damage):
    """Delete images that were there when they were listed."""
    for i in BAD if damage.get("png", b"") is None else ():
        (folder / f"{i:04d}.png").unlink()


def make_indexed(folder, damage):
    return IndexedShards(_tars(folder, damage), 8)


def make_stream(folder, damage):
    return Shards(_tars(folder, damage), 8, samples_per_epoch=2 * COUNT)


def make_pass(folder, damage):
    return Shards(_tars(folder, damage), 8)


def _tars(folder, damage):
    for start in range(0, COUNT, 10):
        write_tar(folder / f"{start:04d}.tar", range(start, start + 10), lambda i: damage if i in BAD else {})
    return folder


def epochs(dataset, num=2, num_workers=0, **options):
    loader = DataModule(5, dataset, num_workers=num_workers, **options).train_loader()
    for epoch in range(num):
        loader.set_epoch(epoch)
        yield [len(batch["image"]) for batch in loader]


@pytest.mark.parametrize("make", [make_folder, make_captions, make_indexed, make_stream, make_pass])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_every_kind_is_skipped_and_counted(tmp_path, make, kind, caplog):
    if make is make_folder and kind not in IMAGE_EXTENSIONS:
        pytest.skip("a folder of images has no captions")
    dataset = make(tmp_path, KINDS[kind])
    with caplog.at_level(logging.WARNING):
        sizes = list(epochs(dataset, max_bad_fraction=0.25))
    assert sizes == [[5] * (12 if make is make_stream else 6)] * 2
    assert dataset.errors.num_unreadable == 3
    told = [record.getMessage() for record in caplog.records if record.name == "ldm.data.core.loader"]
    assert told and told[-1].startswith("data: 3 unreadable so far")
    assert all(f"{i:04d}" in told[-1] for i in BAD)


@pytest.mark.parametrize(
    ("make", "num_workers"),
    [(make_folder, 0), (make_captions, 0), (make_indexed, 0), (make_pass, 0), (make_stream, 0), (make_stream, 2)],
)
def test_too_many_end_the_run_with_one_line_that_names_them(tmp_path, make, num_workers):
    with pytest.raises(
        UserError, match=r"\d of the first \d+ samples cannot be read, more than max_b.*=0.05"
    ) as caught:
        list(epochs(make(tmp_path, KINDS["zero bytes"]), num_workers=num_workers, max_bad_fraction=0.05))
    assert "\n" not in str(caught.value) and any(f"{i:04d}" in str(caught.value) for i in BAD)
    assert str(caught.value).endswith("repair or remove them, or raise data.params.max_bad_fraction")


@pytest.mark.parametrize("make", [make_indexed, make_stream, make_pass])
@pytest.mark.parametrize("cut", [8000, 9000])  # in the bytes of an image, before a header
def test_a_truncated_tar_is_read_up_to_the_cut(tmp_path, make, cut, caplog):
    dataset = make(tmp_path, {})
    path = tmp_path / "0010.tar"
    path.write_bytes(path.read_bytes()[:cut])
    dataset = dataset if make is not make_indexed else IndexedShards(tmp_path, 8)
    with caplog.at_level(logging.WARNING):
        sizes = list(epochs(dataset, num=1, max_bad_fraction=0.25))
    assert all(size == 5 for size in sizes[0]) and 1 <= dataset.errors.num_unreadable <= 2
    assert f"{path}: " in caplog.text and "cannot be read and is skipped" in caplog.text


def test_a_derived_set_keeps_the_limit_of_its_source(tmp_path):
    dataset = make_folder(tmp_path, KINDS["zero bytes"])
    assert list(epochs(LowRes(dataset, 2), num=1, max_bad_fraction=0.25)) == [[5] * 6]
    assert dataset.errors.num_unreadable == 3
    with pytest.raises(UserError, match="max_bad_fraction=0.05"):
        list(epochs(LowRes(make_folder(tmp_path, KINDS["zero bytes"]), 2), max_bad_fraction=0.05))


def test_few_samples_are_not_judged_and_no_limit_is_none(tmp_path):
    write_files(tmp_path, {"png": b""})
    for i in range(12, COUNT):
        (tmp_path / f"{i:04d}.png").unlink()
    assert list(epochs(ImageFolder(tmp_path, 8), num=1, max_bad_fraction=0.0)) == [[5, 5]]
    dataset = make_folder(tmp_path, KINDS["zero bytes"])
    assert list(epochs(dataset, num=1, max_bad_fraction=None)) == [[5] * 6]


@pytest.mark.parametrize("limit", [-0.1, 1.5])
def test_a_limit_that_is_no_share_is_named(tmp_path, limit):
    with pytest.raises(UserError, match="max_bad_fraction .* must be in"):
        DataModule(5, max_bad_fraction=limit)


def test_texts_for_a_tokenizer_leave_damaged_ones_out(tmp_path):
    for name, make in (("a", make_captions), ("b", make_indexed), ("c", make_stream)):
        (tmp_path / name).mkdir()
        for kind in ("bad UTF-8 caption", "missing caption"):
            dataset = make(tmp_path / name, KINDS[kind])
            assert list(dataset.texts()) == [f"picture {i}" for i in range(COUNT) if i not in BAD]


@pytest.mark.parametrize("read", [read_indices, read_hole])
def test_damage_of_maps_and_masks_is_of_the_kind_that_is_skipped(tmp_path, read):
    """Whatever decoders raise: an EXIF cut short, arrays of headers that are none."""
    exif = tmp_path / "exif.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(exif, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    content = exif.read_bytes()
    short = content.replace(b"II*\0\x08\0\0\0\xff\xff", b"II*\0\x08\0\0\0\x00\x05")
    exif.write_bytes(short)
    start = b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': "
    shapes = {"token": b"(4, ((", "size": b"(9999999999, 99999999)}", "empty": b"(0, 4)}"}
    arrays = {name: (start + shape).ljust(200) for name, shape in shapes.items()}
    for name, body in arrays.items():
        (tmp_path / f"{name}.npy").write_bytes(body)
    for path in sorted(tmp_path.iterdir()):
        with contextlib.suppress(*UNREADABLE, UserError):
            read(path)
