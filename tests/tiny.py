"""Tiny models, as objects and as configs: the one place in the tests that writes down how a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.autoencoder.losses import Adversary, KLLoss, VQLoss
from ldm.autoencoder.regularizers import KL, Regularizer, VectorQuantizer
from ldm.conditioning.base import Conditioner
from ldm.conditioning.labels import ClassConditioner
from ldm.diffusion.discrete import DiscreteVP
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.networks.discriminator import PatchDiscriminator
from ldm.networks.encoder_decoder import Architecture
from ldm.networks.unet import UNet
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import DiffusionTraining

SIZE = 8  # of the images
CHANNELS = 2  # of the latents
WIDTH = 8  # of the context
ARCHITECTURE = {"channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1, "z_channels": CHANNELS, "resolution": SIZE}
NETWORK = {"model_channels": 32, "num_res_blocks": 1, "attention_factors": [], "channel_mult": [1], "num_heads": 1}
DISCRIMINATOR = {"width": 4, "num_layers": 1}
OF_THE_MODEL = ("process", "prediction", "latent_scale", "image_key")
Config = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------- objects


def autoencoder(
    seed: int | None = 0, regularizer: Regularizer | None = None, channels: int = 3, **architecture: Any
) -> Autoencoder:
    """Return an autoencoder for images of this many channels, KL-regularised by default."""
    if seed is not None:
        torch.manual_seed(seed)
    parts = Architecture(in_channels=channels, out_channels=channels, **{**ARCHITECTURE, **architecture})
    return Autoencoder(parts, KL() if regularizer is None else regularizer, embed_dim=CHANNELS)


def unet(channels: int = CHANNELS, extra: int = 0, **options: Any) -> UNet:
    """Return a U-Net whose input has `extra` channels of a condition."""
    return UNet(channels + extra, channels, **{**NETWORK, **options})


def latent_diffusion(
    network: torch.nn.Module,
    autoencoder: Autoencoder | IdentityAutoencoder,
    conditioner: Conditioner | None = None,
    num_steps: int = 20,
    **options: Any,
) -> DiffusionTraining:
    """Return the training of these parts, by default on the published process."""
    of_model = {key: options.pop(key) for key in OF_THE_MODEL if key in options}
    process = of_model.pop("process", None) or DiscreteVP.linear(num_steps)
    return DiffusionTraining(LatentDiffusion(network, autoencoder, process, conditioner, **of_model), **options)


def class_diffusion(seed: int = 0, **options: Any) -> DiffusionTraining:
    """Return the training of a class-conditional model of latents; no layer is zero."""
    first_stage = autoencoder(seed)
    network = unet(context_dim=WIDTH)
    torch.nn.init.normal_(network.out[-1].weight, std=0.1)  # zero would leave half without gradient
    conditioner = ClassConditioner(4, WIDTH, null_label=3, drop_rate=0.3)
    return latent_diffusion(network, first_stage, conditioner, **options)


def autoencoder_training(
    seed: int = 0, disc_start: int = 1, with_discriminator: bool = True, **options: Any
) -> AutoencoderTraining:
    """Return the training of a KL-regularised autoencoder."""
    first_stage = autoencoder(seed)
    discriminator = PatchDiscriminator(**DISCRIMINATOR) if with_discriminator else None
    loss = KLLoss(disc_start=disc_start, kl_weight=1e-6, discriminator=discriminator)
    return AutoencoderTraining(first_stage, loss, **options)


def vq_training(
    seed: int = 0, num_codes: int = 16, adversary: Adversary | None = None, **options: Any
) -> AutoencoderTraining:
    """Return the training of a vector-quantized autoencoder."""
    first_stage = autoencoder(seed, VectorQuantizer(num_codes, CHANNELS))
    discriminator = PatchDiscriminator(**DISCRIMINATOR)
    return AutoencoderTraining(first_stage, VQLoss(0, discriminator=discriminator, adversary=adversary), **options)


# ------------------------------------------------------------------------------------------------------------- configs


def node(target: str, **params: Any) -> Config:
    """Return the config of an object of `ldm`."""
    return {"target": f"ldm.{target}", "params": params}


def autoencoder_config(channels: int = CHANNELS, **architecture: Any) -> Config:
    """Return the config of a KL-regularised autoencoder with latents of this many channels."""
    parts = node("networks.encoder_decoder.Architecture", **{**ARCHITECTURE, "z_channels": channels, **architecture})
    regularizer = node("autoencoder.regularizers.KL")
    return node("models.autoencoder.Autoencoder", architecture=parts, regularizer=regularizer, embed_dim=channels)


def identity_config() -> Config:
    """Return the config of the first stage of a model of pixels."""
    return node("models.autoencoder.IdentityAutoencoder")


def unet_config(channels: int = CHANNELS, extra: int = 0, **options: Any) -> Config:
    """Return the config of a U-Net whose input has `extra` channels of a condition."""
    sizes = {"in_channels": channels + extra, "out_channels": channels}
    return node("networks.unet.UNet", **sizes, **{**NETWORK, **options})


def text_config(dim: int = WIDTH, max_length: int = 8, drop_rate: float = 0.2) -> Config:
    """Return the config of a text conditioner whose vocabulary is that of the training captions."""
    tokenizer = node("conditioning.tokenizers.TrainedTokenizer", max_length=max_length, vocab_size=128)
    return node("conditioning.text.TextConditioner", tokenizer=tokenizer, dim=dim, depth=1, drop_rate=drop_rate)


def latent_diffusion_config(
    network: Config, autoencoder: Config, conditioner: Config | None = None, num_steps: int = 20, **options: Any
) -> Config:
    """Return the config of a training of these parts, by default on the published process, the model inside."""
    parts = {"network": network, "autoencoder": autoencoder, "conditioner": conditioner}
    parts["process"] = node("diffusion.discrete.DiscreteVP.linear", num_steps=num_steps)
    parts |= {key: options.pop(key) for key in OF_THE_MODEL if key in options}
    model = node("models.latent_diffusion.LatentDiffusion", **parts)
    return node("training.latent_diffusion.DiffusionTraining", model=model, **options)


def autoencoder_training_config(
    autoencoder: Config | None = None, disc_start: int = 1, with_discriminator: bool = True, **options: Any
) -> Config:
    """Return the config of a training of an autoencoder."""
    discriminator = node("networks.discriminator.PatchDiscriminator", **DISCRIMINATOR) if with_discriminator else None
    loss = node("autoencoder.losses.KLLoss", kl_weight=1e-6, disc_start=disc_start, discriminator=discriminator)
    parts = {"model": autoencoder or autoencoder_config(), "loss": loss}
    return node("training.autoencoder.AutoencoderTraining", **parts, **options)


def sections_of(training: Config, **options: Any) -> Config:
    """Return the sections `model` and `training` of a config with the model inside of its training."""
    parts = dict(training["params"])
    model = parts.pop("model")
    return {"model": model, "training": {"learning_rate": 1e-3, **training, **options, "params": parts}}


def run_config(
    training: Config, train: Config, validation: Config, batch_size: int = 2, lightning: Mapping[str, Any] | None = None
) -> Config:
    """Return a whole config as `main.py` reads it: the sections of a training with its model inside, data, trainer."""
    data = {"batch_size": batch_size, "num_workers": 0, "train": train, "validation": validation}
    trainer = {"accelerator": "cpu", "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    section = {"callbacks": {"image_logger": None}, **(lightning or {})}
    section["trainer"] = {**trainer, **section.get("trainer", {})}
    return {**sections_of(training), "data": node("data.core.module.DataModule", **data), "lightning": section}
