"""Run folders of tiny random models, one a task, and small pictures, for the tests of the scripts."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.config import instantiate

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4  # of maps and layouts


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def node(target, **params):
    return {"target": f"ldm.{target}", "params": params}


def autoencoder_node():
    architecture = node(
        "networks.encoder_decoder.Architecture",
        channels=32, channel_mult=[1, 1], num_res_blocks=1, z_channels=4, resolution=16, attention="none",
    )  # fmt: skip
    regularizer = node("autoencoder.regularizers.KL")
    return node("models.autoencoder.Autoencoder", architecture=architecture, regularizer=regularizer, embed_dim=4)


def diffusion_node(conditioner=None, extra=0, context_dim=None):
    network = node(
        "networks.unet.UNet",
        in_channels=4 + extra, out_channels=4, model_channels=32, num_res_blocks=1, attention_factors=[2],
        channel_mult=[1, 2], num_head_channels=16, context_dim=context_dim,
    )  # fmt: skip
    schedule = node("diffusion.process.Schedule.linear", num_steps=20)
    parts = {"network": network, "autoencoder": autoencoder_node(), "schedule": schedule, "conditioner": conditioner}
    return node("training.latent_diffusion.LatentDiffusion", ema_decay=None, **parts)


def write_run(folder, model):
    """Save a model with weights of which none is zero."""
    for name in ("configs", "checkpoints"):
        (folder / name).mkdir(parents=True)
    data = {"params": {"train": {"params": {"dataset": {"params": {"size": 16}}}}}}
    (folder / "configs" / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    torch.manual_seed(0)
    built = instantiate(model)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.detach(), std=0.05)
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
        "data.layout.boxes.BoxTokenizer", num_classes=CLASSES, max_objects=3, vocab_size=64, encode_crop=False, use_group=False
    )
    layout = node("conditioning.layout.LayoutConditioner", tokenizer=tokenizer, dim=16, depth=1)
    tokens = node(
        "conditioning.text.TokenConditioner",
        vocab_size=64, max_length=11, dim=16, depth=1, key="coordinates_bbox", null_tokens=[63] * 11,
    )  # fmt: skip
    rescaler = node("conditioning.images.SpatialRescaler", in_channels=CLASSES, out_channels=3)
    masked = node("conditioning.images.FirstStageConditioner", mask_key="mask")
    loss = node("autoencoder.losses.KLLoss", disc_start=0)
    training = node("training.autoencoder.AutoencoderTraining", autoencoder=autoencoder_node(), loss=loss)
    models = {
        "inpaint": diffusion_node(masked, extra=5),
        "superres": diffusion_node(node("conditioning.images.ImageConditioner", key="low_res"), extra=3),
        "semantic": diffusion_node(rescaler, extra=3),
        "pairs": diffusion_node(node("conditioning.images.SpatialRescaler", key="partner", in_channels=1), extra=1),
        "layout": diffusion_node(layout, context_dim=16),
        "tokens": diffusion_node(tokens, context_dim=16),
        "none": diffusion_node(),
        "autoencoder": training,
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
