"""Short trainings of tiny models on noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tiny import SIZE
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from ldm.training.lightning_fixes.checkpoints import Checkpoints
from ldm.training.module import TrainingModule


class Noise(Dataset):
    """Items whose image is a function of the index."""

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


def end_step(training: TrainingModule, optimizer: Optimizer) -> None:
    """Do what a trainer does with the gradients of a step: guard, optimiser, averages."""
    training.guard.check_gradients(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    skipped = training.guard.after_step()
    for average in training.all_averages():
        average.update(training.averaged, skipped)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    names = [name for name in first if first[name].numel()]
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in names)


def fit_whole_and_in_two(
    whole: pl.LightningModule, first: pl.LightningModule, second: pl.LightningModule, folder: Path
) -> dict[str, Any]:
    """Train one for four steps, another for two and the third on from there; return the options of going on."""
    fit(whole, folder, 4, batch_size=4)
    fit(first, folder, 2, batch_size=4, callbacks=[Checkpoints(folder)])
    goes_on = {"callbacks": [Checkpoints(folder / "second")], "ckpt_path": str(folder / "last.ckpt")}
    (folder / "second").mkdir()
    fit(second, folder, 4, batch_size=4, **goes_on)
    return goes_on
