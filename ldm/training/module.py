"""What both stages share while they train: keyed randomness, the weight average, and means in the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.training.ema import ExponentialMovingAverage
from ldm.training.meters import Means
from ldm.training.randomness import Draws, seed_from


class TrainingModule(pl.LightningModule):
    """Train with one optimiser, so that `global_step` counts optimiser steps and drives every schedule and interval.

    `learning_rate` and `seed` are attributes that whoever starts the training sets. A subclass sets `model_ema` (or
    None) and says in `averaged` which module it averages.
    """

    model_ema: ExponentialMovingAverage | None

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate, self.seed = learning_rate, 0
        self._train_means, self._logged_step = Means(), 0

    @property
    def averaged(self) -> nn.Module:
        """Give the module whose parameters `model_ema` averages."""
        raise NotImplementedError

    @property
    def may_fuse(self) -> bool:
        """Tell whether the optimiser may be fused: not where a gradient scaler needs the gradients before the step."""
        return self._trainer is None or getattr(self.trainer.precision_plugin, "scaler", None) is None

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Run a block with the averaged weights, where there are any."""
        if self.model_ema is None:
            yield
            return
        with self.model_ema.applied_to(self.averaged):
            yield

    def keyed_draws(self, batch_idx: int) -> Draws:
        """Start the draws of a training batch, dropout masks included, as a function of (seed, rank, step, batch)."""
        key = (self.seed, self.global_rank, self.global_step, batch_idx)
        torch.manual_seed(seed_from(*key))
        return Draws.keyed(self.device, *key)

    def position(self, batch_idx: int) -> int:
        """Number the batches of an evaluation through all ranks."""
        return batch_idx * self.trainer.world_size + self.global_rank

    def networks(self) -> list[nn.Module]:
        """List the parts worth compiling."""
        raise NotImplementedError

    def record(self, logs: dict[str, Tensor]) -> None:
        """Add the values of one training batch to the means that are logged."""
        self._train_means.add(logs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the means since the last time, once every `log_every_n_steps` optimiser steps."""
        step = self.global_step
        if step == self._logged_step or step % self.trainer.log_every_n_steps:
            return  # not due, or in the middle of an accumulation
        self._logged_step = step
        means = self._train_means.take()
        for name, value in means.items():
            if not torch.isfinite(value):
                raise FloatingPointError(f"train/{name} is no longer finite at step {step}")
        logs = {f"train/{name}": value for name, value in means.items()}
        logs["lr_abs"] = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log_dict(logs | self._step_count(), batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the means that are not logged yet."""
        checkpoint["train_means"] = {"means": self._train_means.state_dict(), "logged_step": self._logged_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the means of the interval under way."""
        if "train_means" in checkpoint:
            self._train_means.load_state_dict(checkpoint["train_means"]["means"], self.device)
            self._logged_step = checkpoint["train_means"]["logged_step"]

    def log_means(self, logs: dict[str, Tensor], batch_size: int) -> None:
        """Log values of one evaluated batch, to be averaged over the samples of all ranks."""
        values = {name: value.detach().float() for name, value in logs.items()}
        self.log_dict(values | self._step_count(), on_step=False, on_epoch=True, sync_dist=True, batch_size=batch_size)

    def _step_count(self) -> dict[str, float]:
        """Say where the loggers draw a value; Lightning's own count is one behind."""
        return {"step": float(self.global_step), "epoch": float(self.current_epoch)}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: once per optimiser step, however many batches were accumulated."""
        super().optimizer_step(*args, **kwargs)
        if self.model_ema is not None:
            self.model_ema.update(self.averaged)
