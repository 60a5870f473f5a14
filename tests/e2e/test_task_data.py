"""The paper's task configs with their own readers, on toy files in the layouts that they expect."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from small_configs import CONFIGS, FROM_FILES, draw, narrowing, plain, train

from ldm.config import instantiate, load

COUNT, SIDE = 12, 80
SYNSETS = ("n01440764", "n01443537")
_HEADER = (
    "ImageID Source LabelName Confidence XMin XMax YMin YMax IsOccluded IsTruncated IsGroupOf IsDepiction IsInside"
).split()


def pictures(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + 16, 3), dtype=np.uint8)).save(folder / name)


def coco(folder: Path, split: str) -> dict[str, str]:
    names = [f"{number:012}.jpg" for number in range(COUNT)]
    pictures(folder / split, names)
    shape = {"width": SIDE + 16, "height": SIDE}
    images = [{"id": number, "file_name": name, **shape} for number, name in enumerate(names)]
    for kind, category in (("instances", 1), ("stuff", 92)):
        boxes = [
            {"id": number, "image_id": number, "category_id": category, "bbox": [8, 8, 48, 40], "iscrowd": number % 2}
            for number in range(COUNT)
        ]
        categories = [{"id": category, "name": kind}]
        content = {"images": images, "annotations": boxes, "categories": categories}
        (folder / f"{kind}_{split}.json").write_text(json.dumps(content))
    return {
        "root": str(folder / split),
        "annotations": str(folder / f"instances_{split}.json"),
        "stuff": str(folder / f"stuff_{split}.json"),
    }


def open_images(folder: Path, split: str) -> dict[str, str]:
    names = [f"{number:016x}" for number in range(COUNT)]
    pictures(folder / split, [f"{name}.jpg" for name in names])
    (folder / "classes.csv").write_text("/m/a,Apple\n/m/b,Bell\n")
    with (folder / f"{split}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(_HEADER)
        for name in names:
            rows.writerow([name, "x", "/m/a", 1, 0.1, 0.6, 0.1, 0.7, 0, 0, 0, 0, 0])
            rows.writerow([name, "x", "/m/b", 1, 0.3, 0.9, 0.2, 0.9, 0, 0, 1, 0, 0])
    paths = {"root": folder / split, "boxes_csv": folder / f"{split}.csv", "classes_csv": folder / "classes.csv"}
    return {key: str(path) for key, path in paths.items()}


def maps(folder: Path, split: str) -> dict[str, str]:
    names = [f"{number}.jpg" for number in range(COUNT)]
    pictures(folder / split / "images", names)
    (folder / split / "maps").mkdir()
    for name in names:
        index = np.random.default_rng(0).integers(0, 182, (SIDE, SIDE + 16), dtype=np.uint8)
        Image.fromarray(index).save(folder / split / "maps" / f"{Path(name).stem}.png")
    return {"root": str(folder / split / "images"), "target_root": str(folder / split / "maps")}


def synsets(folder: Path, split: str) -> dict[str, str]:
    pictures(folder / split, [f"{SYNSETS[number % 2]}/{number}.JPEG" for number in range(COUNT)])
    return {"root": str(folder / split)}


def plain_folder(folder: Path, split: str) -> dict[str, str]:
    pictures(folder / split, [f"{number}.jpg" for number in range(COUNT)])
    return {"root": str(folder / split)}


def retrieved(folder: Path, split: str) -> dict[str, str]:
    names = [f"{number}.jpg" for number in range(COUNT)]
    pictures(folder / split, names)
    embedding = np.random.default_rng(0).normal(size=(COUNT, 768))
    np.savez(folder / f"{split}.npz", embedding=embedding, path=[str(folder / split / name) for name in names])
    return {"root": str(folder / split), "database": str(folder / f"{split}.npz")}


FILES: dict[str, Callable[[Path, str], dict[str, str]]] = {  # how they are made
    "layout2img_coco": coco,
    "layout2img_openimages": open_images,
    "semantic_synthesis_256": maps,
    "superres_bicubic": synsets,
    "superres_bsr": plain_folder,
    "inpainting": plain_folder,
    "class2img_f4": synsets,
    "lsun_bedrooms": plain_folder,
    "retrieval_768": retrieved,
}


@pytest.mark.parametrize("name", FROM_FILES)
def test_trains_and_draws_from_files(name: str, tmp_path: Path) -> None:
    if name == "superres_bsr":
        pytest.importorskip("cv2")
    make, size = FILES[name], FROM_FILES[name]
    config = plain(CONFIGS / "ldm" / f"{name}.yaml")
    words = [word for word in narrowing(config) if not (name == "retrieval_768" and word.endswith("dim=32"))]
    for split in ("train", "validation"):
        params = f"data.params.{split}.params"
        if "dataset" in config["data"]["params"][split]["params"]:
            params += ".dataset.params"
        changes: dict[str, object] = {**make(tmp_path, split), "size": size}
        if OmegaConf.select(OmegaConf.create(config), f"{params}.resize"):
            changes |= {"resize": size + 16}
        words += [f"{params}.{key}={value}" for key, value in changes.items()]
    run = train(CONFIGS / "ldm" / f"{name}.yaml", tmp_path, words)
    batch = next(iter(instantiate(load(run / "configs" / "config.yaml").data, "data").validation_loader()))
    assert batch["image"].shape == (2, 3, size, size)
    assert torch.isfinite(draw(run, batch)).all()
