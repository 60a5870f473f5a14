"""`make demo` and `make tasks` in small: the same scripts and configs, a few steps each."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT, fails, script

FEW = tuple(f"lightning.trainer.{key}" for key in ("max_steps=2", "val_check_interval=2", "log_every_n_steps=1"))
FEW += ("lightning.callbacks.image_logger.params.sampler={target: ldm.sampling.ddim.DDIM, params: {steps: 2}}",)
FEW_SCENES = ("data.params.train.params.num_samples=64", "data.params.validation.params.num_samples=16")


def run(name: str, *arguments: str | Path) -> None:
    script(name).main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    quick = ("--num-captions", "4", "--ddim_steps", "2")
    run("demo", "--outdir", folder, *quick, *FEW, *FEW_SCENES)
    return folder


def test_demo_trains_both_stages_and_writes_its_report(demo):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert "validation PSNR of the autoencoder" in page and " of 4 (" in page
    for picture in ("samples", "unseen", "losses", "wrong"):
        with Image.open(demo / f"{picture}.png") as image:
            assert min(image.size) > 100
    assert len(list((demo / "logs").iterdir())) == 2


def test_tasks_measure_what_the_demo_trained_and_train_the_rest(demo, tmp_path):
    runs = {path.name.split("_", 1)[1]: path for path in (demo / "logs").iterdir()}
    given = ("--run", f"autoencoder_shapes={runs['autoencoder_shapes']}", "--run", f"text={runs['txt2img_shapes']}")
    quick = ("--num-samples", "8", "--ddim_steps", "2", "--batch-size", "8")
    chosen = (*given, "--tasks", "text,layout")
    run("tasks", "--jobs", "0", *FEW, *FEW_SCENES, "--outdir", tmp_path / "out", *quick, *chosen)
    figures = json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8"))
    assert list(figures) == ["text", "layout"]
    assert all({"right", "shuffled"} <= set(value) for task in figures.values() for value in task["figures"].values())
    assert "layout to image" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_tasks_on_photos(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(2):
            pixels = rng.integers(0, 255, (9, 9, 3), np.uint8)
            Image.fromarray(pixels).resize((140, 140)).save(tmp_path / split / f"{i}.jpg")
    quick = ("--num-samples", "8", "--ddim_steps", "2", "--batch-size", "8", "data.params.batch_size=4")
    photos = ("--photos", str(tmp_path), "--tasks", "superres,inpainting")
    command = [sys.executable, "scripts/tasks.py", *FEW, *quick, "--outdir", str(tmp_path / "out"), *photos]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "figures.json").read_text(encoding="utf-8"))
    assert figures["inpainting"]["figures"]["largest change of a known pixel"]["right"] == 0
    assert figures["superres"]["figures"]["PSNR, dB, of bicubic enlarging"]["reference"] > 15


def test_tasks_on_photos_without_photos_are_one_clear_line(tmp_path, capsys):
    error = fails(capsys, script("tasks").main, "--outdir", tmp_path, "--tasks", "superres")
    assert "tasks superres" in error and "photos" in error
