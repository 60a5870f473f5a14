"""The state of a training between two steps, in the terms of Lightning's loops.

Works around Lightning 2.6, which saves in the middle of the hooks of a batch and, when it resumes, leaves out what was
still to come of it: a validation, the end of an epoch. The state made here says that the batch is done, and whether a
validation that is due after it was made; Lightning then resumes with exactly what is missing.
"""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
from torch.distributed.checkpoint.stateful import Stateful

from ldm.errors import UserError

State = dict[str, Any]
_BATCHES, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
_COUNTS = ("ready", "started", "processed", "completed")
# Lightning's sign of an evaluation that was broken off; it then begins with its first batch, since none is completed.
_BROKEN_OFF = {"total": dict.fromkeys(_COUNTS, 0) | {"ready": 1, "started": 1}, "current": dict.fromkeys(_COUNTS, 0)}


def after_batch(trainer: pl.Trainer) -> State:
    """Return the state after the batch under way: it is done, and a validation due after it is still to come."""
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    for counts in (state[_BATCHES]["total"], state[_BATCHES]["current"]):
        counts["completed"] = counts["processed"]
    state[_VALIDATION] = {**_BROKEN_OFF, "is_last_batch": False}
    return state


def with_validation_done(state: State, trainer: pl.Trainer) -> State:
    """Return the same state, but a validation due after the batch was made."""
    return {**state, _VALIDATION: copy.deepcopy(trainer.fit_loop.state_dict()[_VALIDATION])}


def go_on(trainer: pl.Trainer) -> None:
    """Mark the data fetcher exhausted when resuming at the end of an epoch with a loader that has no state."""
    if trainer.is_last_batch and not isinstance(trainer.train_dataloader, Stateful):
        trainer.fit_loop._data_fetcher.done = True


def align_logging(trainer: pl.Trainer) -> None:
    """Set the step counter of Lightning's loggers, which is separate and one short after a resume."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def samples_per_batch(trainer: pl.Trainer) -> int:
    """Return the samples of one batch over all ranks."""
    return trainer.train_dataloader.batch_size * trainer.world_size


def recount(trainer: pl.Trainer, saved: int) -> None:
    """Convert progress that was counted in batches of `saved` samples to those of this run.

    Raises UserError if the run is in the middle of one.
    """
    now = samples_per_batch(trainer)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if (samples := progress.current.ready * saved) % now:
        raise UserError(
            f"--resume: the checkpoint was saved after {samples} samples of an epoch, which batches of {now} over all "
            "ranks do not divide; choose data.params.batch_size, devices and accumulate_grad_batches that do"
        )
    for counts in (progress.total, progress.current):
        for name in _COUNTS:
            setattr(counts, name, getattr(counts, name) * saved // now)
