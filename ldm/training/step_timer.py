"""The seconds of a training step, measured while it trains."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import pytorch_lightning as pl

_WINDOW = 10  # steps


class StepTimer(pl.Callback):
    """Time windows of ten optimiser steps, with loading of data and without validation.

    A window instead of one step, because data workers deliver in bursts and an accelerator lags behind its host;
    nothing waits for the device.
    """

    def __init__(self) -> None:
        self._windows: list[float] = []
        self._start = self._pause = 0.0
        self._first_step = 0

    @property
    def seconds_per_step(self) -> float:
        """Return the median of all windows but the first, which warms up; nan if no step was made."""
        timed = self._windows[1:] or self._windows
        return statistics.median(timed) if timed else math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the first window."""
        self._begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a window that is full."""
        if trainer.global_step - self._first_step >= _WINDOW:
            self._end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on."""
        self._start += time.perf_counter() - self._pause

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the window that is not full, if there is no other."""
        if not self._windows and trainer.global_step > self._first_step:
            self._end(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._first_step, self._start = trainer.global_step, time.perf_counter()

    def _end(self, trainer: pl.Trainer) -> None:
        self._windows.append((time.perf_counter() - self._start) / (trainer.global_step - self._first_step))
        self._begin(trainer)
