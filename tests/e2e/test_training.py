"""Both stages from the command line, as a user starts them, also on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from tiny import (
    autoencoder_config,
    autoencoder_training_config,
    latent_diffusion_config,
    node,
    run_config,
    text_config,
    unet_config,
)

from ldm.weights import files as storage

ROOT = Path(__file__).parents[2]
SHARED = ROOT / "tests"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with pictures of shapes, their captions, and a config for each stage."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(16):
        colour = ("red", "green", "blue")[number % 3]
        image = Image.new("RGB", (24, 20), "white")
        x, y = rng.integers(0, 12, 2).tolist()
        ImageDraw.Draw(image).ellipse((x, y, x + 8, y + 8), fill=colour)
        image.save(folder / "pictures" / f"{number:02}.png")
        (folder / "pictures" / f"{number:02}.txt").write_text(f"a {colour} circle, number {number}")
    autoencoder = autoencoder_config(resolution=16)
    network = unet_config(attention_factors=[1], context_dim=8)
    models = {
        "kl": autoencoder_training_config(autoencoder, ema_decay=0.9),
        "text": latent_diffusion_config(network, autoencoder, text_config(), latent_scale="measure"),
    }
    options = {"root": "pictures", "size": 16, "validation_share": 0.25}
    train, validation = (
        node("data.readers.captions.CaptionedFolder", split=split, **options) for split in ("train", "validation")
    )
    for name, model in models.items():
        config = run_config(model, train, validation, lightning={"trainer": {"num_sanity_val_steps": 1}})
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(folder: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SHARED}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def only_run(logs: Path) -> Path:
    (found,) = logs.iterdir()
    return found


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.proof
def test_both_stages_one_after_the_other(workplace: Path) -> None:
    printed = run(workplace, "--base", "kl.yaml", "-t", "--max_steps", "3", "-l", "first", "--precision", "bf16-mixed")
    assert "learning rate: 0.001" in printed
    first = only_run(workplace / "first")
    weights = f"model.params.autoencoder.checkpoint={first}/checkpoints/last.ckpt"
    words = ("--base", "text.yaml", "-t", "--max_steps", "3", "-l", "second")
    run(workplace, *words, weights, "lightning.channels_last=true")
    second = only_run(workplace / "second")
    content = storage.load(second / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 3
    assert {name.split(".")[0] for name in content["state_dict"] if "." in name} == {
        "model", "model_ema", "first_stage_model", "cond_stage_model",
    }  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize("name", ["kl", "text"])
def test_two_processes_end_equal_on_different_data_and_draws(workplace: Path, name: str) -> None:
    folder = workplace / f"ranks-{name}"
    folder.mkdir()
    words = "--accelerator cpu --devices 2 --strategy ddp --max_steps 2 -l".split() + [str(folder / "logs")]
    callback = "lightning.callbacks.report"
    report = [
        "--allow",
        "rank_report",
        f"{callback}.target=rank_report.RankReport",
        f"{callback}.params.directory={folder}",
    ]
    printed = run(workplace, "-b", f"{name}.yaml", "-t", "training.allow_untrained_first_stage=true", *words, *report)
    assert "global batch: 4 = 2 per device x 2 devices" in printed
    first, second = reports(folder)
    assert first["digest"] == second["digest"]
    assert first["step"] == second["step"] == 2
    assert not set(first["captions"]) & set(second["captions"])
    assert first["draws"] != second["draws"]
    assert not first["find_unused"]
    assert (only_run(folder / "logs") / "checkpoints" / "last.ckpt").is_file()
