"""Checkpoints by optimiser step, written whole or not at all, and never over good ones with broken weights.

`last.ckpt` is replaced at an interval, at the end and when the run is asked to stop; the one before it is kept as
`previous.ckpt`, next to numbered and best ones. A crash writes nothing. Parts that are not trained are stored once (see
`ldm.weights.files`).

Works around Lightning 2.6, whose ModelCheckpoint writes in place, and saves in the middle of the hooks of a step: a
resumed run then leaves out what was still to come (a validation, a row of metrics). Here a save is decided on in the
hooks and made after them; the number of rows of metrics.csv is saved, and a resumed run cuts the file there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import TorchCheckpointIO

from ldm.errors import UserError, shown
from ldm.training.lightning_fixes import loop_state
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.training.lightning_fixes.signals import GracefulStop, Stopped
from ldm.training.module import TrainingModule
from ldm.training.strategies import local_part
from ldm.weights import files as storage
from ldm.weights.audit import read_torch

_LOG = logging.getLogger(__name__)
_BETTER = {"min": torch.lt, "max": torch.gt}
_MOST_FAILURES = 3
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class Checkpoints(pl.Callback):
    """Save `last.ckpt` every `every_n_steps` and keep a numbered copy every `keep_every_n_steps` (None: no copies).

    Of the numbered ones `keep_last` stay (None: all). `monitor` names a validation metric whose best value so far
    (`mode` min or max) is kept as `best.ckpt`. `separate_frozen` False puts all weights into each file.
    """

    def __init__(
        self,
        directory: str | Path,
        every_n_steps: int = 1000,
        keep_every_n_steps: int | None = None,
        keep_last: int | None = None,
        monitor: str | None = None,
        mode: str = "min",
        separate_frozen: bool = True,
    ) -> None:
        for interval in (every_n_steps, keep_every_n_steps, keep_last):
            if interval is not None and (not isinstance(interval, int) or interval < 1):
                raise UserError("modelcheckpoint: intervals are counted in optimiser steps, from 1 up; keep_last too")
        if mode not in _BETTER:
            raise UserError(f"modelcheckpoint: mode '{mode}' is unknown; use min or max")
        self.directory = Path(directory)
        self.every_n_steps, self.keep_every_n_steps, self.keep_last = every_n_steps, keep_every_n_steps, keep_last
        self.monitor, self.mode, self.separate_frozen = monitor, mode, separate_frozen
        self._best: torch.Tensor | None = None
        self._samples_per_batch: int | None = None
        self._seen_step, self._saved_step, self._failures = -1, -1, 0
        self._stop, self._files = GracefulStop(), CheckpointFiles()
        self._frozen: storage.FrozenParts | None = None
        self._due: loop_state.State | None = None  # a save of last.ckpt that was decided on: the state of the loops
        self._asked = self._at_end = False
        self._is_readable = False  # whether a save of this process was read back

    def state_dict(self) -> dict[str, Any]:
        """Keep the best value and what it is one of, and the samples of a batch, in which Lightning counts progress."""
        state = {} if self._best is None else {"best": self._best, "best_of": [self.monitor, self.mode]}
        return state | {"samples_per_batch": self._samples_per_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best value of the resumed run, unless it is now another metric's, and how it counted."""
        best_of = [self.monitor, self.mode]
        self._best = state_dict.get("best") if state_dict.get("best_of", best_of) == best_of else None
        self._samples_per_batch = state_dict.get("samples_per_batch")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue metrics.csv after the rows that it had when the checkpoint was saved."""
        metrics = _metrics_of(trainer)
        if metrics is not None:
            metrics.go_on_after(checkpoint.get("metrics_rows"))

    # --- when ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read and write files with `CheckpointFiles`."""
        trainer.strategy.checkpoint_io = self._files

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals, and do not save again what was just loaded."""
        self._seen_step = self._saved_step = trainer.global_step
        if self._samples_per_batch is not None:
            loop_state.recount(trainer, int(self._samples_per_batch))
            loop_state.go_on(trainer)
        self._files.is_restoring = False
        self._samples_per_batch = loop_state.samples_per_batch(trainer)
        if self.separate_frozen:
            self._frozen = storage.FrozenParts(self.directory, frozen_names(pl_module))
        self._stop.listen(trainer.world_size)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide on a save when a step was made and one is due or was asked for."""
        step = trainer.global_step
        if step == self._seen_step:
            return  # in the middle of an accumulation
        self._seen_step = step
        self._asked = self._stop.agreed()
        self._at_end = _is_last_step(trainer)
        if self._asked or self._at_end or self._is_due(step):
            self._due = loop_state.after_batch(trainer)

    def _is_due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or self._is_numbered(step)

    def _is_numbered(self, step: int) -> bool:
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    # The first hook after those of a step is one of these.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, if it was decided on, before a validation that may take long; at the end of training, after it."""
        if not trainer.sanity_checking and not self._at_end:
            self._make_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save, if it was decided on, before the next batch."""
        loop_state.align_logging(trainer)
        self._make_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, if it was decided on, before the next epoch."""
        if not self._at_end:
            self._make_due(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Break off a validation when the run is asked to stop; a resumed run makes it. Alone: ranks meet at steps."""
        if self._stop.is_pending and trainer.world_size == 1 and not (trainer.sanity_checking or self._at_end):
            self._due, self._asked = loop_state.after_batch(trainer), True
            self._make_due(trainer, pl_module)

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
            state = loop_state.with_validation_done(loop_state.after_batch(trainer), trainer)
            self._save(trainer, pl_module, state, BEST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of a run, whatever ended it."""
        if self._due is not None:
            self._due = loop_state.with_validation_done(self._due, trainer)
            self._make_due(trainer, pl_module)
        elif trainer.global_step != self._saved_step:
            self._save(trainer, pl_module, trainer.fit_loop.state_dict(), LAST)
        if self._failures:
            raise UserError(f"{self.directory / LAST}: the end of the run could not be saved; make room and resume it")
        if self._asked or (self._stop.is_pending and trainer.world_size == 1):
            raise Stopped(f"asked to stop; saved step {trainer.global_step}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        self._stop.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers; nothing is saved."""
        self._stop.release()

    # --- how -------------------------------------------------------------------------------------------------------

    def _make_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._due is None:
            return
        state, self._due = self._due, None
        step = trainer.global_step
        self._save(trainer, module, state, LAST)
        if self._asked and not self._at_end:
            if self._failures:
                raise UserError(f"{self.directory / LAST}: asked to stop, but step {step} could not be saved")
            raise Stopped(f"asked to stop; saved step {step}")

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, loops: loop_state.State, name: str) -> None:
        """Write a temporary file, verify and rename it, so that no half-written file is ever visible.

        A failure warns and training goes on, until there were several in a row. All ranks take part, and all go on.
        """
        finite = torch.stack([local_part(parameter).isfinite().all() for parameter in module.parameters()]).all()
        if not trainer.strategy.reduce_boolean_decision(bool(finite)):
            raise UserError(
                f"{self.directory}: at step {trainer.global_step} weights are not finite any more; nothing was saved; "
                "go on from what is there with a lower learning rate"
            )
        temporary = self.directory / f"{name}.tmp"
        if trainer.is_global_zero:
            temporary.unlink(missing_ok=True)  # what a kill left may be a numbered checkpoint, under its other name
        self._files.expect(loops, self._frozen, _metrics_of(trainer))
        trainer.save_checkpoint(temporary)
        problem = self._files.problem
        if trainer.is_global_zero and problem is None:
            try:
                if not self._is_readable:  # the structure of later ones is the same
                    read_torch(temporary, checksums=False)
                    self._is_readable = True
                if name == LAST and self._is_numbered(trainer.global_step):
                    self._keep_numbered(temporary, trainer.global_step)
                keeps_previous = name != LAST or self._files.is_from_previous
                storage.publish(temporary, self.directory / name, None if keeps_previous else self.directory / PREVIOUS)
            except (OSError, UserError) as error:
                problem = error
        if problem is None:
            self._failures = 0
            if name == LAST:
                self._saved_step, self._files.is_from_previous = trainer.global_step, False
            return
        self._failures += 1
        temporary.unlink(missing_ok=True)
        _LOG.warning("%s was not saved at step %d: %s", self.directory / name, trainer.global_step, problem)
        if self._failures == _MOST_FAILURES:
            raise UserError(f"{self.directory}: {_MOST_FAILURES} saves in a row failed, the last by: {problem}")

    def _keep_numbered(self, temporary: Path, step: int) -> None:
        """Give a written file its number, before it becomes `last.ckpt`: a resumed run never comes back to it."""
        storage.inspect(temporary)
        storage.link(temporary, self.directory / f"step={step:09}.ckpt")
        for surplus in sorted(self.directory.glob("step=*.ckpt"))[: -self.keep_last if self.keep_last else 0]:
            surplus.unlink()


class CheckpointFiles(TorchCheckpointIO):
    """Write what Lightning collects with our additions, and note a failure for later; read only what is safe."""

    def __init__(self) -> None:
        self.problem: Exception | None = None
        self.is_restoring = False  # from reading a checkpoint to the first step
        self.is_from_previous = False  # the run goes on from previous.ckpt, which stays until there is a good last.ckpt
        self._loops: loop_state.State | None = None
        self._frozen: storage.FrozenParts | None = None
        self._metrics: MetricsCsv | None = None

    def expect(self, loops: loop_state.State, frozen: storage.FrozenParts | None, metrics: MetricsCsv | None) -> None:
        """Set what the next checkpoint holds."""
        self.problem, self._loops, self._frozen, self._metrics = None, loops, frozen, metrics

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. Called on the first rank alone, which must not leave the others waiting."""
        try:
            if self._loops is not None:
                checkpoint["loops"]["fit_loop"], self._loops = self._loops, None
                checkpoint["metrics_rows"] = None if self._metrics is None else self._metrics.flush()
                if self._frozen is not None:
                    self._frozen.take_out(checkpoint)
            storage.write(checkpoint, Path(path))
        except OSError as error:
            self.problem = error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, or the one before it if it is damaged. Raises UserError."""
        self.is_restoring = True
        found, content = storage.first_good(storage.with_earlier(Path(path)), storage.load)
        self.is_from_previous = found.name == PREVIOUS
        return content


@contextmanager
def resuming(trainer: pl.Trainer, path: Path | None) -> Iterator[None]:
    """Say in one line that a checkpoint lacks the state of a run, where Lightning fails between reading and a step."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        files = trainer.strategy.checkpoint_io
        if not (isinstance(files, CheckpointFiles) and files.is_restoring):
            raise
        reason = shown(f"{type(error).__name__}: {error}", 100)
        raise UserError(f"{path}: cannot be resumed from, it lacks the state of a run ({reason})") from error


def _metrics_of(trainer: pl.Trainer) -> MetricsCsv | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, MetricsCsv)), None)


def frozen_names(module: TrainingModule) -> list[str]:
    """List tensors of submodules that are in eval mode while others train, and the weights under adapters."""
    names: dict[str, None] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        parameters = list(part.parameters())
        if parameters and not part.training and not any(parameter.requires_grad for parameter in parameters):
            names |= dict.fromkeys(part.state_dict(prefix=f"{prefix}."))
        elif hasattr(part, "lora_A"):
            own = part.named_parameters(recurse=False)
            names |= {f"{prefix}.{name}": None for name, value in own if not value.requires_grad}
    return [module.published_name(name) for name in names]


def _is_last_step(trainer: pl.Trainer) -> bool:
    """Return whether this step is the last.

    Saving here, before Lightning marks the epoch finished, lets an extended run (larger max_steps) resume inside it.
    """
    if trainer.global_step == trainer.max_steps or trainer.should_stop:
        return True
    epochs = trainer.max_epochs
    return bool(epochs) and epochs > 0 and trainer.is_last_batch and trainer.current_epoch == epochs - 1
