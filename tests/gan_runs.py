"""Adversarial trainings on one and on two ranks: python gan_runs.py FOLDER.

The processes are forked from this one, which imports everything once and computes nothing.
"""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from tiny import CHANNELS, SIZE, autoencoder
from torch.utils.data import DataLoader, Dataset, Subset

from ldm.autoencoder.losses import Adversary, VQLoss
from ldm.autoencoder.regularizers import VectorQuantizer
from ldm.networks.discriminator import PatchDiscriminator
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.codebook import CodebookUpkeep

STEPS, BATCH, RANKS = 5, 4, 2
TOLERANCE = 1e-9
VARIANTS = ("synchronized", "actnorm", "per_rank")


class Uneven(Dataset):
    """Give images that are a function of the index, of unequal brightness."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, SIZE, SIZE, generator=generator, dtype=torch.float64) * 2 - 1
        return {"image": image * (index % 5 + 1) / 5}


def model(variant: str) -> AutoencoderTraining:
    is_on = variant != "per_rank"
    torch.manual_seed(0)  # also of the codes, which are made before the autoencoder
    first_stage = autoencoder(regularizer=VectorQuantizer(64, CHANNELS))
    discriminator = PatchDiscriminator(width=4, num_layers=1, actnorm=variant == "actnorm", synchronized=is_on)
    loss = VQLoss(disc_start=2, discriminator=discriminator, adversary=Adversary(synchronized=is_on, ramp=2))
    decay = 0.9 if variant == "synchronized" else None
    upkeep = CodebookUpkeep(decay=decay, restart_every=2)
    training = AutoencoderTraining(first_stage, loss, codebook=upkeep, ema_decay=0.9)
    training.learning_rate = 1e-3
    return training


def train(rank: int, ranks: int, folder: Path, port: int) -> None:
    """Train every variant as one rank and save where it ended."""
    torch.set_num_threads(1)
    strategy: Any = "auto"
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for variant in VARIANTS:
        if ranks > 1:
            strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False, gradient_as_bucket_view=True)
        trained, validated = (
            DataLoader(Subset(Uneven(), range(rank, count, ranks)), BATCH // ranks) for count in (STEPS * BATCH, 5)
        )
        trainer = pl.Trainer(
            accelerator="cpu", devices=ranks, strategy=strategy, precision="64-true", max_steps=STEPS, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, num_sanity_val_steps=0,
            log_every_n_steps=STEPS, use_distributed_sampler=False, default_root_dir=folder,
        )  # fmt: skip
        training = model(variant)
        trainer.fit(training, trained, validated)
        momenta = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
        checkpoint: dict[str, Any] = {}
        training.on_save_checkpoint(checkpoint)
        names = [f"{split}/{name}" for split in ("train", "val") for name in ("perplexity", "codebook_usage")]
        codes = {name: trainer.callback_metrics[name] for name in names}
        end = {"weights": dict(training.state_dict()), "momenta": dict(enumerate(momenta)), "codes": codes}
        torch.save(end | {"upkeep": checkpoint["codebook"]["upkeep"]}, folder / f"{variant}-{rank}-of-{ranks}.pt")


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for ranks in (1, RANKS):
        torch.multiprocessing.start_processes(train, (ranks, Path(sys.argv[1]), port), ranks, start_method="fork")
