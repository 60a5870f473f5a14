"""Tiny runs as a training leaves them: without condition, of classes, of texts, of all other tasks; one broken."""

from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny import WIDTH, node, text_config
from tiny_runs import diffusion_config, write_run, write_runs

from ldm.serve.drawing import Studio

FIELDS = ["caption", "class_label", "boxes", "box_labels", "segmentation"]
SCENES = node("toy.shapes.Shapes", num_samples=14, size=16, fields=FIELDS)
NEIGHBOURS = node("toy.thumbnails.ThumbnailNeighbours", num_neighbours=2, dataset=SCENES, database=SCENES)
DATA = {"train": SCENES, "validation": {**SCENES, "params": {**SCENES["params"], "seed": 1}}}


def with_data(run: Path, **splits) -> Path:
    """Put data sets into the config of a run."""
    file = run / "configs" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["data"] = node("data.core.module.DataModule", batch_size=2, **splits)
    file.write_text(yaml.safe_dump(content))
    return run


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("logs")
    classes = node("conditioning.labels.ClassConditioner", num_classes=5, embed_dim=WIDTH, null_label=4, drop_rate=0.1)
    conditioners = {"1-none": (None, None), "2-class": (classes, WIDTH), "3-text": (text_config(), WIDTH)}
    for number, (name, (conditioner, width)) in enumerate(conditioners.items(), start=1):
        run = with_data(write_run(root / name, diffusion_config(conditioner, context_dim=width)), **DATA)
        lines = ["step,epoch,train/loss,val/loss", f"1,0,{number}.5,", "2,0,0.25,0.5", "3,1,nan,inf", "4,1,0.12"]
        (run / "metrics.csv").write_text("\n".join(lines))  # the last line is being written
        (run / "images" / "val").mkdir(parents=True)
        for step in (5, 10):
            name = f"samples_gs-{step:06}_e-000000_b-000000.png"
            Image.new("RGB", (4, 4), (step, 0, 0)).save(run / "images" / "val" / name)
        (run / "images" / "val" / "secret.png").write_text("not one of the images")
    (root / "0-broken" / "configs").mkdir(parents=True)
    return root


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a run of each task, with data, and one of retrieval."""
    root = tmp_path_factory.mktemp("tasks")
    runs = write_runs(root)
    neighbours = node("conditioning.text.EmbeddingConditioner", key="neighbours", dim=192, num_tokens=2)
    runs["retrieval"] = write_run(root / "retrieval", diffusion_config(neighbours, context_dim=192))
    small = node("data.image_pairs.super_resolution.LowRes", dataset=SCENES, factor=2)
    data = {"retrieval": NEIGHBOURS, "superres": small, "pairs": small}
    return {name: with_data(run, train=data.get(name, SCENES), validation=data.get(name, SCENES))
            for name, run in runs.items()}  # fmt: skip


@pytest.fixture
def studio():
    made = Studio(torch.device("cpu"))
    yield made
    made.stop()
