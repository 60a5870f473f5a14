"""Both stages through `main.py` on CUDA: precisions, compilation, resume, cached latents, scripts, waiting, memory."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fitting import Noise, end_step
from PIL import Image
from tiny import (
    autoencoder_config,
    autoencoder_training,
    autoencoder_training_config,
    class_diffusion,
    latent_diffusion_config,
    node,
    run_config,
    text_config,
    unet_config,
)

from ldm.cli import evaluate, img2img, reconstruct, txt2img
from ldm.cli.arguments import parse
from ldm.cli.train import main, plan_of
from ldm.data.core.loader import collate
from ldm.training.cost import StepCounter, Way, _size
from ldm.training.devices import autocast, matmul_precision
from ldm.training.made_up_steps import forward
from ldm.training.module import TrainingModule
from ldm.training.run import build_without_memory
from ldm.weights import load as checkpoint

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("autoencoder", "text")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a config for each stage, and captioned images."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"image {number}")
    data = node("data.readers.captions.CaptionedFolder", root=str(folder / "images"), size=16, crop="center")
    parts = autoencoder_config(resolution=16), unet_config(attention_factors=[1], context_dim=8)
    models = {
        "autoencoder": autoencoder_training_config(parts[0], ema_decay=0.9),
        "text": latent_diffusion_config(parts[1], parts[0], text_config(), latent_scale="measure"),
    }
    for name, model in models.items():
        lightning = {"trainer": {"accelerator": "gpu", "max_steps": 4}, "callbacks": {"image_logger": None}}
        content = run_config(model, data, data, batch_size=4, lightning=lightning)
        content["training"]["allow_untrained_first_stage"] = True
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def train(configs: Path, stage: str, logs: Path, *words: str) -> Path:
    assert main(["-b", str(configs / f"{stage}.yaml"), "-t", "-l", str(logs), *words]) == 0
    return next(logs.iterdir())


def equal(first: Path, second: Path) -> bool:
    one, other = checkpoint.read(first), checkpoint.read(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_each_precision_trains(configs: Path, tmp_path: Path, stage: str, precision: str) -> None:
    run = train(configs, stage, tmp_path, "--precision", precision)
    assert all(bool(value.isfinite().all()) for value in checkpoint.read(run).values() if value.is_floating_point())


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_by_block_with_channels_last_trains(configs: Path, tmp_path: Path, stage: str) -> None:
    words = ("--precision", "bf16-mixed", "lightning.compile=true", "lightning.channels_last=true")
    train(configs, stage, tmp_path, *words)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bit_identical(configs: Path, tmp_path: Path, stage: str) -> None:
    exact = "lightning.trainer.deterministic=true"
    whole = train(configs, stage, tmp_path / "whole", exact)
    begun = train(configs, stage, tmp_path / "begun", exact, "--max_steps", "2")
    assert main(["-r", str(begun), "-t", "--max_steps", "4"]) == 0
    assert equal(whole, begun)


def test_training_from_cached_latents_is_training_from_images(configs: Path, tmp_path: Path) -> None:
    exact = "lightning.trainer.deterministic=true"
    plain = train(configs, "text", tmp_path / "plain", exact)
    assert equal(plain, train(configs, "text", tmp_path / "cached", exact, "lightning.cache_latents=true"))


@pytest.fixture(scope="module")
def trained(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the run that scripts draw from."""
    return train(configs, "text", tmp_path_factory.mktemp("trained"))


WALK = ("--steps", "3", "--H", "16", "--W", "16")
SCRIPTS = {
    "txt2img": (txt2img, "--prompt", "image 3", "--scale", "3", *WALK, "--outdir"),
    "img2img": (img2img, "--prompt", "image 3", "--indir", "{images}", *WALK, "--outdir"),
    "reconstruct": (reconstruct, "--indir", "{images}", "--outdir"),
    "evaluate": (evaluate, "--n", "4", "--metrics", "frechet", "--steps", "3", "--out"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_works(name: str, configs: Path, trained: Path, tmp_path: Path) -> None:
    script, *words = SCRIPTS[name]
    for image in (configs / "images").glob("1?.png"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / image.name).write_bytes(image.read_bytes())
    given = [word.format(images=tmp_path / "images") for word in words]
    script.main(["--run", str(trained), *given, str(tmp_path / "out")])
    assert [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".png", ".json")]


def test_a_run_goes_on_in_another_precision(configs: Path, tmp_path: Path) -> None:
    begun = train(configs, "text", tmp_path, "--precision", "16-mixed", "--max_steps", "2")
    assert main(["-r", str(begun), "-t", "--max_steps", "4", "--precision", "bf16-mixed"]) == 0


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
def test_all_devices_train_together_by_nccl(configs: Path, tmp_path: Path, strategy: str) -> None:
    devices = str(torch.cuda.device_count())
    words = ["-b", str(configs / "text.yaml"), "-t", "-l", str(tmp_path), "--devices", devices, "--strategy", strategy]
    words += ["--max_steps", "3", "data.params.batch_size=2", "--precision", "bf16-mixed"]
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("precision", "band"), [("bf16-mixed", 2e-2), ("16-mixed", 5e-3), ("tf32", 2e-3)])
@pytest.mark.parametrize("make", [class_diffusion, autoencoder_training])
def test_the_loss_in_lower_precision_is_near_that_of_float32(
    make: Callable[[], TrainingModule], precision: str, band: float
) -> None:
    training = make().cuda().train()
    training.setup("fit")
    batch = on_device(collate([Noise()[index] for index in range(4)]))
    with torch.no_grad():
        exact = float(training.training_step(batch, 0))
        training.seen = 0  # which chooses the noise
        with matmul_precision("high" if precision == "tf32" else None), autocast(precision, "cuda"):
            found = float(training.training_step(batch, 0))
    assert found == pytest.approx(exact, rel=band)


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("make", [class_diffusion, autoencoder_training])
def test_nothing_in_a_step_waits_for_the_device(make: Callable[[], TrainingModule]) -> None:
    training = make().cuda().train()
    training.setup("fit")
    optimizer = training.configure_optimizers()["optimizer"]
    batch = on_device(collate([Noise()[index] for index in range(4)]))
    for number in range(22):
        if number == 2:  # warm
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            training.training_step(batch, number).backward()
            end_step(training, optimizer)
        except BaseException:
            torch.cuda.set_sync_debug_mode("default")
            raise
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["autoencoder/kl_f8", "ldm/ffhq"])
def test_peak_memory_is_as_foretold(name: str) -> None:
    plan = plan_of(parse(["-b", str(ROOT / "configs" / f"{name}.yaml"), "--dry-run", "--accelerator", "gpu"]))
    training = build_without_memory(plan)
    size, batch = _size(training, None), 8
    foretold = StepCounter(training, size, "bf16-mixed", Way(kernels=True, channels_last=True))(batch).peak
    gc.collect(), torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()  # workspaces, and what earlier tests left
    training = build_without_memory(plan).to_empty(device="cuda").to(memory_format=torch.channels_last).train()
    for tensor in [*training.parameters(), *training.buffers()]:
        torch.nn.init.constant_(tensor.data, 0.01) if tensor.is_floating_point() else tensor.zero_()
    training.setup("fit")
    optimizer = training.configure_optimizers()["optimizer"]
    torch.set_default_device("cuda")
    try:
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            with autocast("bf16-mixed", "cuda"):
                forward(training, batch, size).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for average in training.all_averages():
                average.update(training.averaged)
    finally:
        torch.set_default_device(None)
    assert abs((torch.cuda.max_memory_allocated() - before) / foretold - 1) < 0.05
