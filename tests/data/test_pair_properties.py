"""Generated trees of pairs with every fault at once: what is good comes out right, what is not is named."""

import io
import logging

import numpy as np
import pytest
import torch
from picture_files import pixels
from PIL import Image

from ldm.data.core.transforms import SampleKey
from ldm.data.image_pairs.inpainting import MaskedFolder
from ldm.data.image_pairs.paired import PairedFolder

K = 4
KINDS = ("RGB", "L", "RGBA", "I;16", "P", "1")  # of images
FAULTS = ("none", "no partner", "truncated picture", "truncated partner", "other shape")


def encoded(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def picture(kind, index, height, width):
    array = pixels(index, height, width)
    if kind == "I;16":
        return Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(array).convert(kind)


def write_tree(root, seed):
    """Write 12 pairs of random kinds, sizes and faults, the first without any; return the names by fault."""
    rng = np.random.RandomState(seed)
    names = {fault: [] for fault in FAULTS}
    for index in range(12):
        fault = FAULTS[0] if index == 0 else FAULTS[rng.randint(len(FAULTS))]
        kind, height, width = KINDS[rng.randint(len(KINDS))], rng.randint(10, 40), rng.randint(10, 40)
        name = f"{'deep/' * rng.randint(3)}{index:02}.png"
        image = encoded(picture(kind, index, height, width))
        shape = (height, 3 * width) if fault == "other shape" else (height, width)
        partner = encoded(Image.fromarray(rng.randint(0, K, shape).astype(np.uint8)))
        if fault.startswith("truncated"):
            image, partner = (image[: len(image) // 2], partner) if "picture" in fault else (image, partner[:40])
        for folder, content in (("a", image), ("b", partner)):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            if folder == "a" or fault != "no partner":
                (root / folder / name).write_bytes(content)
        names[fault].append(name)
    return names


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crop", ["center", "random", "random_size", "random_half", "none"])
def test_maps(tmp_path, caplog, seed, crop):
    names = write_tree(tmp_path, seed)
    with caplog.at_level(logging.WARNING):
        dataset = PairedFolder(tmp_path / "a", [8, 12], tmp_path / "b", num_classes=K, crop=crop, flip=0.5)
        items = [dataset[SampleKey(i, epoch)] for epoch in range(2) for i in range(len(dataset))]
    for item in items:
        assert item["image"].shape == (3, 8, 12) and item["image"].abs().max() <= 1
        assert item["segmentation"].shape == (8, 12)
        assert 0 <= item["segmentation"].min() and item["segmentation"].max() < K
    faulty = [name for fault in FAULTS[2:] for name in names[fault]]
    assert dataset.errors.num_unreadable == len(faulty) and len(dataset) == 12 - len(names["no partner"])
    assert all(caplog.text.count(f"{name} cannot be read") == 1 for name in faulty)
    assert (f"{len(names['no partner'])} of 12 images have no target" in caplog.text) == bool(names["no partner"])


@pytest.mark.parametrize("seed", range(4))
def test_masks_and_images(tmp_path, seed):
    write_tree(tmp_path, seed)
    options = {"crop": "random", "flip": 0.5}
    for item in MaskedFolder(tmp_path / "a", 8, tmp_path / "b", **options):
        assert item["mask"].shape == (1, 8, 8) and set(item["mask"].unique().tolist()) <= {-1.0, 1.0}
        assert torch.equal(item["masked_image"] == item["image"], (item["mask"] < 0) | (item["image"] == -1))
    for item in PairedFolder(tmp_path / "a", 8, tmp_path / "b", "target", **options):
        assert item["target"].shape == item["image"].shape and item["target"].abs().max() <= 1
