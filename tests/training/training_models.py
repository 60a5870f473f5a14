"""Tiny real models and data for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.autoencoder.losses import Adversary, KLLoss, VQLoss
from ldm.autoencoder.regularizers import KL, Regularizer, VectorQuantizer
from ldm.conditioning.labels import ClassConditioner
from ldm.diffusion.process import Schedule
from ldm.models.autoencoder import Autoencoder
from ldm.networks.discriminator import PatchDiscriminator
from ldm.networks.encoder_decoder import Architecture
from ldm.networks.unet import UNet
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import LatentDiffusion

SIZE = 8


class Noise(Dataset):
    """Give images that are a function of the index."""

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, SIZE, SIZE, generator=generator) * 2 - 1
        return {"image": image, "class_label": index % 3, "caption": f"a thing {index}"}


def loader(length: int = 8, batch_size: int = 2) -> DataLoader:
    return DataLoader(Noise(length), batch_size)


def autoencoder(seed: int = 0, regularizer: Regularizer | None = None) -> Autoencoder:
    torch.manual_seed(seed)
    architecture = Architecture(channels=32, channel_mult=(1, 1), num_res_blocks=1, z_channels=2, resolution=SIZE)
    return Autoencoder(architecture, KL() if regularizer is None else regularizer, embed_dim=2)


def latent_diffusion(seed: int = 0, **options: Any) -> LatentDiffusion:
    first_stage = autoencoder(seed)
    network = UNet(2, 2, 32, num_res_blocks=1, attention_factors=(), channel_mult=(1,), num_heads=1, context_dim=8)
    torch.nn.init.normal_(network.out[-1].weight, std=0.1)  # zero would leave half without gradient
    conditioner = ClassConditioner(4, 8, null_label=3, drop_rate=0.3)
    schedule = Schedule.linear(num_steps=20)
    return LatentDiffusion(network, first_stage, schedule, conditioner=conditioner, **options)


def autoencoder_training(seed: int = 0, disc_start: int = 1, with_discriminator: bool = True, **options: Any):
    first_stage = autoencoder(seed)
    discriminator = PatchDiscriminator(width=4, num_layers=1) if with_discriminator else None
    loss = KLLoss(disc_start=disc_start, kl_weight=1e-6, discriminator=discriminator)
    return AutoencoderTraining(first_stage, loss, **options)


def vq_training(seed: int = 0, num_codes: int = 16, adversary: Adversary | None = None, **options: Any):
    first_stage = autoencoder(seed, VectorQuantizer(num_codes, 2))
    discriminator = PatchDiscriminator(width=4, num_layers=1)
    return AutoencoderTraining(first_stage, VQLoss(0, discriminator=discriminator, adversary=adversary), **options)


def fit(model: pl.LightningModule, folder: Path, steps: int, batch_size: int = 2, **options: Any) -> pl.Trainer:
    resume = options.pop("ckpt_path", None)
    with_validation = options.pop("with_validation", False)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=options.pop("enable_progress_bar", False),
        logger=options.pop("logger", False),
        log_every_n_steps=1,
        **options,
    )
    validation = loader(4, batch_size) if with_validation else None
    trainer.fit(model, loader(8, batch_size), validation, ckpt_path=resume, weights_only=True)
    return trainer


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    names = [name for name in first if first[name].numel()]
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in names)
