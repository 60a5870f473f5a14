"""Run folders of tiny random models, one a task, and small pictures, for the tests of the scripts."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import autoencoder_config, autoencoder_training_config, latent_diffusion_config, node, unet_config

from ldm.conditioning.text import TextConditioner
from ldm.config import instantiate

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 4  # of maps and layouts


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_stage_config():
    return autoencoder_config(4, resolution=16, attention="none")


def diffusion_config(conditioner=None, extra=0, context_dim=None):
    network = unet_config(4, extra, attention_factors=[2], channel_mult=[1, 2], context_dim=context_dim)
    return latent_diffusion_config(network, first_stage_config(), conditioner, ema_decay=None)


def sections(training):
    """Return the sections of a config for the config of a training with its model inside."""
    parts = dict(training["params"])
    return {"model": parts.pop("model"), "training": {**training, "params": parts}}


def write_run(folder, training):
    """Save a training with weights of which none is zero."""
    for name in ("configs", "checkpoints"):
        (folder / name).mkdir(parents=True)
    data = {"params": {"train": {"params": {"dataset": {"params": {"size": 16}}}}}}
    (folder / "configs" / "config.yaml").write_text(yaml.safe_dump({**sections(training), "data": data}))
    torch.manual_seed(0)
    built = instantiate(training)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.detach(), std=0.05)
    for module in built.modules():
        if isinstance(module, TextConditioner):
            module.tokenizer.fit(["a red circle above a blue square", "a green triangle"])
    torch.save({"state_dict": built.state_dict()}, folder / "checkpoints" / "last.ckpt")
    return folder


def trained_on(folder, run, **options):
    """Give the run again, as if its data had these options."""
    config = yaml.safe_load((run / "configs" / "config.yaml").read_text())
    config["data"]["params"]["train"]["params"]["dataset"]["params"] |= options
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    return folder


def write_runs(root):
    """Save a model of each task."""
    tokenizer = node(
        "data.layout.boxes.BoxTokenizer",
        num_classes=CLASSES, max_objects=3, vocab_size=64, encode_crop=False, use_group=False,
    )  # fmt: skip
    layout = node("conditioning.layout.LayoutConditioner", tokenizer=tokenizer, dim=16, depth=1)
    tokens = node(
        "conditioning.text.TokenConditioner",
        vocab_size=64, max_length=11, dim=16, depth=1, key="coordinates_bbox", null_tokens=[63] * 11,
    )  # fmt: skip
    rescaler = node("conditioning.images.SpatialRescaler", in_channels=CLASSES, out_channels=3)
    masked = node("conditioning.images.FirstStageConditioner", mask_key="mask")
    models = {
        "inpaint": diffusion_config(masked, extra=5),
        "superres": diffusion_config(node("conditioning.images.ImageConditioner", key="low_res"), extra=3),
        "semantic": diffusion_config(rescaler, extra=3),
        "pairs": diffusion_config(node("conditioning.images.SpatialRescaler", key="partner", in_channels=1), extra=1),
        "layout": diffusion_config(layout, context_dim=16),
        "tokens": diffusion_config(tokens, context_dim=16),
        "none": diffusion_config(),
        "autoencoder": autoencoder_training_config(first_stage_config(), with_discriminator=False),
    }
    return {name: write_run(root / name, model) for name, model in models.items()}


def run(main, folder, where, *arguments, steps=2):
    settings = [] if steps is None else ["--steps", steps]
    main(list(map(str, ["--run", folder, "--outdir", where, "--device", "cpu", *settings, *arguments])))


def load(path):
    return np.asarray(Image.open(path))


def record(folder):
    return json.loads(sorted(folder.glob("grid-*.json"))[-1].read_text())


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def fails(capsys, main, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]
