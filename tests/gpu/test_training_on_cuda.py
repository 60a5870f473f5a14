"""Both stages through `main.py` on CUDA: precisions, compilation, resume, cached latents, scripts, waiting, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fitting import Noise
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

from ldm.cli import txt2img
from ldm.cli.arguments import parse
from ldm.cli.train import main, plan_of
from ldm.data.core.loader import collate
from ldm.training.cost import StepCounter, Way, _size
from ldm.training.devices import autocast
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


def test_a_script_draws(configs: Path, tmp_path: Path) -> None:
    run = train(configs, "text", tmp_path / "logs")
    words = ["--run", str(run), "--prompt", "image 3", "--steps", "3", "--H", "16", "--W", "16", "--outdir"]
    txt2img.main([*words, str(tmp_path / "out"), "--n_samples", "1"])
    assert list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("make", [class_diffusion, autoencoder_training])
def test_nothing_in_a_step_waits_for_the_device(make: Callable[[], TrainingModule]) -> None:
    training = make().cuda().train()
    training.setup("fit")
    optimizer = training.configure_optimizers()["optimizer"]
    batch: dict[str, Any] = collate([Noise()[index] for index in range(4)])
    batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    for number in range(22):
        if number == 2:  # warm
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            training.training_step(batch, number).backward()
            training.guard.check_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            skipped = training.guard.after_step()
            for average in training.all_averages():
                average.update(training.averaged, skipped)
        except BaseException:
            torch.cuda.set_sync_debug_mode("default")
            raise
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["autoencoder/kl_f8", "ldm/ffhq"])
def test_peak_memory_is_as_foretold(name: str) -> None:
    plan = plan_of(parse(["-b", str(ROOT / "configs" / f"{name}.yaml"), "--dry-run", "--accelerator", "gpu"]))
    training = build_without_memory(plan)
    size, batch = _size(training, None), 4
    foretold = StepCounter(training, size, "bf16-mixed", Way(kernels=True, channels_last=True))(batch).peak
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
        torch.set_default_device("cpu")
    assert abs(torch.cuda.max_memory_allocated() / foretold - 1) < 0.05
