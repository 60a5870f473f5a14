"""Checkpoints by optimiser step, written whole or not at all, and never over good ones with broken weights.

`last.ckpt` is renewed at an interval, at the end and on request; numbered and best ones are kept beside it. Signals
request: at the next step SIGUSR1 saves, SIGTERM and the first Ctrl-C save and end the run. A crash writes nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.errors import UserError
from ldm.training.strategies import local_part

_LOG = logging.getLogger(__name__)
_BETTER = {"min": torch.lt, "max": torch.gt}


class Checkpoints(pl.Callback):
    """Save `last.ckpt` every `every_n_steps` and keep a numbered copy every `keep_every_n_steps` (None: no copies).

    `monitor` names a validation metric whose best value so far (`mode` min or max) is kept as `best.ckpt`.
    """

    def __init__(
        self,
        directory: str | Path,
        every_n_steps: int = 1000,
        keep_every_n_steps: int | None = None,
        monitor: str | None = None,
        mode: str = "min",
    ) -> None:
        if every_n_steps < 1 or (keep_every_n_steps is not None and keep_every_n_steps < 1):
            raise UserError("modelcheckpoint: intervals are counted in optimiser steps, from 1 up")
        if mode not in _BETTER:
            raise UserError(f"modelcheckpoint: mode '{mode}' is unknown; use min or max")
        self.directory = Path(directory)
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.monitor, self.mode = monitor, mode
        self._best: torch.Tensor | None = None
        self._seen_step, self._saved_step = -1, -1
        self._requests: set[int] = set()
        self._previous_handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Keep the best value."""
        return {} if self._best is None else {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best value of the resumed run."""
        self._best = state_dict.get("best")

    # --- when ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals, and do not save again what was just loaded."""
        self._seen_step = self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():  # only there may signals be handled
            for number in _signals():
                self._previous_handlers[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requests.add(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends the run at once
            signal.signal(number, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when a step was made and a save is due or was asked for."""
        step = trainer.global_step
        if step == self._seen_step:
            return  # in the middle of an accumulation
        self._seen_step = step
        asked = self._asked(trainer, step)
        keep = self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0
        if asked or keep or step % self.every_n_steps == 0 or _is_last_step(trainer):
            self._save(trainer, pl_module, "last.ckpt")
        if keep:
            self._copy(trainer, f"step={step:09}.ckpt")
        if asked - {getattr(signal, "SIGUSR1", None)}:
            _LOG.info("asked to stop; saved step %d", step)
            trainer.should_stop = True

    def _asked(self, trainer: pl.Trainer, step: int) -> set[int]:
        """Take the pending requests; several ranks agree on them only now and then, since that makes them wait."""
        if trainer.world_size > 1:
            if step % trainer.log_every_n_steps:
                return set()
            agreed = trainer.strategy.reduce_boolean_decision
            asked = {number for number in self._previous_handlers if agreed(number in self._requests, all=False)}
        else:
            asked = set(self._requests)
        self._requests -= asked
        return asked

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best so far."""
        if self.monitor is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"modelcheckpoint.monitor: there is no metric '{self.monitor}'; this run logs {names}")
        value = trainer.callback_metrics[self.monitor].detach().cpu()
        if self._best is None or bool(_BETTER[self.mode](value, self._best)):
            self._best = value
            self._save(trainer, pl_module, "best.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of a run that something else stopped."""
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module, "last.ckpt")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back; nothing is saved."""
        self._release()

    def _release(self) -> None:
        while self._previous_handlers:
            signal.signal(*self._previous_handlers.popitem())

    # --- how -------------------------------------------------------------------------------------------------------

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
        """Write beside the target and rename, so that no reader and no crash ever meets half a file."""
        finite = torch.stack([local_part(parameter).isfinite().all() for parameter in module.parameters()]).all()
        if not trainer.strategy.reduce_boolean_decision(bool(finite)):
            raise FloatingPointError(f"weights are no longer finite at step {trainer.global_step}; nothing was saved")
        path = self.directory / name
        temporary = path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, path)
        if name == "last.ckpt":
            self._saved_step = trainer.global_step

    def _copy(self, trainer: pl.Trainer, name: str) -> None:
        """Keep last.ckpt under a second name; it is never written in place, so a link is a copy."""
        if trainer.is_global_zero:
            path = self.directory / name
            path.unlink(missing_ok=True)
            path.hardlink_to(self.directory / "last.ckpt")


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Foresee the end. Saved within the last batch, a run goes on as if it had never ended; after it, Lightning has
    counted a broken-off epoch as done.
    """
    if trainer.global_step == trainer.max_steps:
        return True
    epochs = trainer.max_epochs
    return bool(epochs) and epochs > 0 and trainer.is_last_batch and trainer.current_epoch == epochs - 1


def _signals() -> list[int]:
    """List the signals to listen to: SIGUSR1 only where it exists and nobody (a requeueing cluster) uses it already."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if "SIGUSR1" in signal.Signals.__members__ and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        numbers.append(signal.SIGUSR1)
    return numbers
