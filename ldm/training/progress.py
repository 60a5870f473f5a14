"""Progress with rate and time left: one line that is rewritten on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor

_LOG = logging.getLogger(__name__)
_SMOOTHING = 0.3
_VALIDATION_LINE = ("val/loss_simple", "val/loss_simple_ema", "val/rec_loss", "val/total_loss", "val/psnr")


class Progress(ProgressBar):
    """Report step, loss, rate and time left; `every_seconds` None means 0.5 s on a terminal, 10 s elsewhere.

    The first step, which compiles and fills caches, does not count towards the rate. The loss is read from the device
    only when a line is written.
    """

    def __init__(self, every_seconds: float | None = None) -> None:
        super().__init__()
        self._on_terminal = sys.stderr.isatty()
        self._every = every_seconds if every_seconds is not None else (0.5 if self._on_terminal else 10.0)
        self._enabled, self._is_warm = True, False
        self._rate: float | None = None
        self._start_time, self._last_time, self._last_step, self._samples = 0.0, 0.0, 0, 0

    def disable(self) -> None:
        """Write nothing, as on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Write again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start_time = time.monotonic()
        self._restart_clock(trainer.global_step)
        self._is_warm = False

    def _restart_clock(self, step: int) -> None:
        self._last_time, self._last_step, self._samples = time.monotonic(), step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a line if the last one is old enough."""
        if not self._is_warm:
            self._warm_up(trainer.global_step)
            return
        self._samples += _batch_size(batch)
        seconds = time.monotonic() - self._last_time
        if not self._enabled or seconds < self._every:
            return
        step = trainer.global_step
        rate = (step - self._last_step) / seconds
        self._rate = rate if self._rate is None else (1 - _SMOOTHING) * self._rate + _SMOOTHING * rate
        images = self._samples * trainer.world_size / seconds
        total = total_steps(trainer)
        parts = [f"step {step}" + (f"/{total}" if total else ""), f"epoch {trainer.current_epoch}"]
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):
            parts.append(f"loss {float(loss):.4f}")
        parts += [f"{self._rate:.2f} steps/s", f"{images:.1f} images/s"]
        if total and self._rate > 0:
            parts.append(f"{duration((total - step) / self._rate)} left")
        self._write("  ".join(parts))
        self._restart_clock(step)

    def _warm_up(self, step: int) -> None:
        """Wait for the end of the first step, say how long it took, and start the clock anew."""
        if step == self._last_step:
            return  # a part of an accumulated batch
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.monotonic() - self._last_time
        if self._enabled and seconds >= self._every:
            self._write(f"step {step}  the first took {seconds:.1f} s")
        self._is_warm = True
        self._restart_clock(step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the means of a validation, and leave its time out of the rate."""
        if self._enabled and not trainer.sanity_checking:
            values = sorted(trainer.callback_metrics.items())
            shown = "  ".join(f"{name} {float(value):.4f}" for name, value in values if name in _VALIDATION_LINE)
            self._clear_line()
            _LOG.info("validation at step %d: %s", trainer.global_step, shown)
        self._restart_clock(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the last step."""
        if self._enabled:
            self._clear_line()
            taken = duration(time.monotonic() - self._start_time)
            _LOG.info("trained to step %d, epoch %d in %s", trainer.global_step, trainer.current_epoch, taken)

    def _write(self, line: str) -> None:
        if self._on_terminal:
            _show(f"\r\x1b[2K{line}")
        else:
            _LOG.info(line)

    def _clear_line(self) -> None:
        if self._on_terminal:
            _show("\r\x1b[2K")


def _show(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:  # the terminal is gone; the run saves and stops, or goes on under nohup
        return


def total_steps(trainer: pl.Trainer) -> int | None:
    """Return the optimiser steps of the whole run as max_steps and max_epochs limit them; None without a limit."""
    limits = [trainer.max_steps] if trainer.max_steps and trainer.max_steps > 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs and epochs > 0 and math.isfinite(batches):
        limits.append(math.ceil(batches / trainer.accumulate_grad_batches) * epochs)
    return int(min(limits)) if limits else None


def duration(seconds: float) -> str:
    """Write seconds as 1:02:03 or 2d 1:02:03."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


def _batch_size(batch: Any) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0), 0)
