"""Snapshots of the averages of a training, from which averages of any other length are made afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldm.bounds import Count
from ldm.environment import first_name
from ldm.errors import UserError
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.strategies import whole_weights
from ldm.weights.post_hoc import run_of, write_snapshot

_log = logging.getLogger(__name__)


class Snapshots(pl.Callback):
    """Write the averages of `training.params.averages` every `every_n_steps` optimiser steps, and at the end.

    They go to `snapshots/` of the run folder, 2 bytes a weight and average; `ldm ema` reads them. UserError without two
    averages of different lengths, which a reconstruction needs.
    """

    def __init__(self, directory: str | Path, every_n_steps: Count = 5000) -> None:
        self.directory, self.every_n_steps = Path(directory).parent / "snapshots", every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a training without averages before its first step."""
        self._last_step = trainer.global_step
        self.directory = trainer.strategy.broadcast(self.directory)
        kept = pl_module.averages.values() if isinstance(pl_module, DiffusionTraining) else ()
        if len({average.sigma_rel for average in kept}) < 2:
            example = "training.params.averages={short: 0.05, long: 0.1}"
            raise UserError(f"snapshots: two averages of different lengths are needed; set {example}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DiffusionTraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write them when they are due."""
        if trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: DiffusionTraining) -> None:
        """Write the last ones."""
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, module: DiffusionTraining) -> None:
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        with whole_weights(trainer):
            if trainer.is_global_zero:
                averages = {name: average.named_averages() for name, average in module.averages.items()}
                profiles = {name: average.profile for name, average in module.averages.items()}
                try:
                    folder = self.directory.parent  # which may have another name by now
                    run = first_name(folder) or run_of(self.directory) or folder.name
                    write_snapshot(self.directory, step, averages, profiles, run)
                except OSError as error:  # as a checkpoint that cannot be written
                    _log.warning("the snapshot of step %d could not be written: %s", step, error)
