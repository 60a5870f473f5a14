"""Two ranks of half a batch each equal one rank with all of it, also behind disc_start, if norm and weight allow it.

In float64: what is left is the order of sums. Adam divides by a gradient's own size and would turn the rounding of
float32, where a gradient is mathematically zero, into whole steps.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
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


class Pictures(Dataset):
    """Give pictures that are a function of the index, of unequal brightness."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        picture = torch.rand(3, SIZE, SIZE, generator=generator, dtype=torch.float64) * 2 - 1
        return {"image": picture * (index % 5 + 1) / 5}


def model(variant: str) -> AutoencoderTraining:
    is_on = variant != "per_rank"
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
            DataLoader(Subset(Pictures(), range(rank, count, ranks)), BATCH // ranks) for count in (STEPS * BATCH, 5)
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


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Train on one rank and on two; give by variant where the one rank, the first and the second of two ended."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = torch.multiprocessing.spawn(train, (RANKS, folder, port), RANKS, join=False)
    train(0, 1, folder, port)
    while not both.join():
        pass
    numbers = [(0, 1), (0, RANKS), (1, RANKS)]
    return {
        variant: [torch.load(folder / f"{variant}-{rank}-of-{of}.pt") for rank, of in numbers] for variant in VARIANTS
    }


def difference(first: dict[Any, torch.Tensor], second: dict[Any, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.mark.parametrize("variant", ["synchronized", "actnorm"])
@pytest.mark.parametrize("part", ["weights", "momenta", "upkeep", "codes"])
def test_two_ranks_equal_one(ends: dict[str, list[dict[str, Any]]], variant: str, part: str) -> None:
    one, first, _ = ends[variant]
    assert difference(one[part], first[part]) < TOLERANCE


def test_what_synchronisation_is_for(ends: dict[str, list[dict[str, Any]]]) -> None:
    one, first, _ = ends["per_rank"]
    assert difference(one["weights"], first["weights"]) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_end_with_the_same_weights(ends: dict[str, list[dict[str, Any]]], variant: str) -> None:
    _, first, second = ends[variant]
    own = ("running_mean", "running_var") if variant == "per_rank" else ()  # each rank's own batches
    weights = [{name: v for name, v in end["weights"].items() if not name.endswith(own)} for end in (first, second)]
    assert difference(*weights) == 0
    assert difference(first["upkeep"], second["upkeep"]) == 0
