"""Small trainings of both stages, on a folder and on shards, that exercise all that a checkpoint has to hold.

Validation, best and numbered checkpoints, averages, warm-up, a discriminator, dropped conditions, a measured scale.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

_SIZE, _ITEMS, _BATCH, _STEPS = 8, 12, 2, 30


def _node(target: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.{target}", "params": params}


def write_configs(folder: Path) -> dict[str, Path]:
    """Write images as a folder and as shards, and a config for each stage on each."""
    _write_images(folder)
    paths = {}
    stages = (("autoencoder", _first_stage(), "val/rec_loss"), ("diffusion", _second_stage(), "val/loss_simple_ema"))
    for stage, sections, monitor in stages:
        for kind in ("folder", "shards"):
            lightning = {**_LIGHTNING, "modelcheckpoint": {"params": {**_SAVES, "monitor": monitor}}}
            config = {**sections, "data": _data(folder, kind), "lightning": lightning}
            paths[f"{stage}, {kind}"] = folder / f"{stage}-{kind}.yaml"
            paths[f"{stage}, {kind}"].write_text(yaml.safe_dump(config))
    return paths


_LIGHTNING = {
    "trainer": {
        "max_steps": _STEPS,
        "accelerator": "cpu",
        "log_every_n_steps": 4,  # not a multiple of the saves, so that means are under way at some of them
        "val_check_interval": 5,
        "num_sanity_val_steps": 1,
    },
    "callbacks": {"image_logger": None},
}
_SAVES = {"every_n_steps": 3, "keep_every_n_steps": 10, "keep_last": 2}


def _write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    tars = [tarfile.open(folder / f"{number}.tar", "w") for number in range(3)]
    for number in range(_ITEMS):
        image, buffer = Image.fromarray(rng.integers(0, 255, (_SIZE, _SIZE, 3), dtype=np.uint8)), io.BytesIO()
        image.save(buffer, "PNG")
        for name, content in ((f"{number:02}.png", buffer.getvalue()), (f"{number:02}.txt", b"a picture")):
            (folder / "images" / name).write_bytes(content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tars[number % 3].addfile(member, io.BytesIO(content))
    for tar in tars:
        tar.close()


def _data(folder: Path, kind: str) -> dict[str, Any]:
    images = _node("data.readers.captions.CaptionedFolder", root=str(folder / "images"), size=_SIZE)
    train = images
    if kind == "shards":
        urls = str(folder / "{0..2}.tar")
        train = _node("data.shards.shards.Shards", urls=urls, size=_SIZE, samples_per_epoch=_ITEMS, buffer=4)
    return _node("data.core.module.DataModule", batch_size=_BATCH, num_workers=0, train=train, validation=images)


def _autoencoder() -> dict[str, Any]:
    parts = {"channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": 2, "resolution": _SIZE}
    architecture = _node("networks.encoder_decoder.Architecture", **parts)
    return _node(
        "models.autoencoder.Autoencoder",
        architecture=architecture,
        regularizer=_node("autoencoder.regularizers.KL"),
        embed_dim=2,
    )


def _first_stage() -> dict[str, Any]:
    discriminator = _node("networks.discriminator.PatchDiscriminator", width=4, num_layers=1)
    loss = _node("autoencoder.losses.KLLoss", kl_weight=1e-6, disc_start=8, discriminator=discriminator)
    training = _node("training.autoencoder.AutoencoderTraining", loss=loss, ema_decay=0.9)
    return {"model": _autoencoder(), "training": training | {"learning_rate": 1e-3}}


def _second_stage() -> dict[str, Any]:
    network = {"in_channels": 2, "out_channels": 2, "model_channels": 32, "num_res_blocks": 1, "num_heads": 1}
    network |= {"attention_factors": [1], "channel_mult": [1], "context_dim": 8}
    tokenizer = _node("conditioning.tokenizers.TrainedTokenizer", max_length=6, vocab_size=64)
    conditioner = _node("conditioning.text.TextConditioner", tokenizer=tokenizer, dim=8, depth=1, drop_rate=0.2)
    warm_up = {"warm_up_steps": 5, "lr_min": 1.0, "lr_max": 1.0, "lr_start": 0.1, "max_decay_steps": 100}
    schedule = _node("training.lr_schedules.WarmUpCosine", **warm_up)
    model = _node(
        "models.latent_diffusion.LatentDiffusion",
        network=_node("networks.unet.UNet", **network),
        autoencoder=_autoencoder(),
        process=_node("diffusion.discrete.DiscreteVP.linear", num_steps=20),
        conditioner=conditioner,
        latent_scale="measure",
    )
    optimization = _node("training.optimization.Optimization", schedule=schedule)
    training = _node("training.latent_diffusion.DiffusionTraining", optimization=optimization)
    return {"model": model, "training": training | {"learning_rate": 1e-3, "allow_untrained_first_stage": True}}
