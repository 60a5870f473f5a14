"""What both stages share while they train: draws by sample number, the weight average, the guard, means in the log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.errors import UserError, some
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.finetuning import choose_trained, evaluate_frozen
from ldm.training.lightning_fixes.guard import StepGuard
from ldm.training.meters import DatasetMean, RunningMean
from ldm.training.optimization import Group, clip_gradients, group_by_rate
from ldm.training.randomness import TRAINING, VALIDATION, Draws, seed_device, seed_from
from ldm.weights.adapters import MAGNITUDE, LoRA, is_of_adapter
from ldm.weights.patterns import matched

_SCALE_SEARCH = 24  # a gradient scaler begins at 2^16 and finds its scale by halving it at steps that it leaves out
_OF_A_NAME = 60  # characters in a message


class DoesNotFit(UserError):
    """The state of a run is that of another model or training."""


class TrainingModule(pl.LightningModule):
    """Train with one optimiser, so that `global_step` counts optimiser steps and drives every schedule and interval.

    `learning_rate`, `seed` and `guard` are attributes that whoever starts the training sets. A subclass sets `model`,
    `model_ema` (or None), says in `averaged` which module it averages, and names in `root_parts` the children whose
    entries stand at the root of the state dict, as published; the model is the first. `seen` counts the training
    samples of all ranks. `gradient_clip` bounds the norm of each part's gradients where the trainer does not say.
    """

    model: nn.Module
    model_ema: ExponentialMovingAverage | None
    gradient_clip: float | None = None
    root_parts: tuple[str, ...] = ()

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate, self.seed, self.seen = learning_rate, 0, 0
        self.guard = StepGuard()
        self._train_means, self._logged_step = RunningMean(), 0
        self._evaluation_means, self._evaluated = DatasetMean(), 0
        self._factors: dict[str, float] = {}  # of learning rates
        self._has_frozen_parts = self._checks_adapter = False

    @property
    def averaged(self) -> nn.Module:
        """Return the module whose parameters `model_ema` averages."""
        raise NotImplementedError

    @property
    def has_scaler(self) -> bool:
        """Return whether a gradient scaler is at work (16-mixed)."""
        return self._trainer is not None and getattr(self.trainer.precision_plugin, "scaler", None) is not None

    @property
    def may_fuse(self) -> bool:
        """Return whether the optimiser may be fused: not where a gradient scaler needs the gradients first."""
        return not self.has_scaler

    @property
    def world_size(self) -> int:
        """Count the processes that train together."""
        return 1 if self._trainer is None else self.trainer.world_size

    def all_averages(self) -> list[ExponentialMovingAverage]:
        """List the averages of the weights that are kept: `model_ema`, if there is one, and those beside it."""
        return [] if self.model_ema is None else [self.model_ema]

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Run a block with the averaged weights, where there are any."""
        if self.model_ema is None:
            yield
            return
        with self.model_ema.applied_to(self.averaged):
            yield

    def networks(self) -> list[nn.Module]:
        """List the parts worth compiling."""
        raise NotImplementedError

    # --- what is trained -------------------------------------------------------------------------------------------

    def trained_parts(self) -> list[list[nn.Parameter]]:
        """List what is trained, by networks: the gradients of each are clipped on their own."""
        raise NotImplementedError

    def choose(
        self, train: Sequence[str] | None, learning_rates: Mapping[str, float] | None, adapter: LoRA | None
    ) -> None:
        """Freeze, add an adapter, and note factors of learning rates, once the parts are there but before the average.

        Args:
            train: Patterns of names in the state dict; None trains all, or the adapter alone.
            learning_rates: Pattern -> factor; the last one that matches a name decides.
            adapter: What is added to layers of the model, and trained.

        UserError for a pattern that matches nothing.
        """
        choose_trained(self.model, train, adapter)
        self._has_frozen_parts = train is not None or adapter is not None
        self._checks_adapter = adapter is not None
        self.train()
        names = self.named(parameter for part in self.trained_parts() for parameter in part)
        rates = learning_rates or {}
        found = matched(rates, names, "learning_rates", "parameter that is trained")
        self._factors = {name: rates[pattern] for name, pattern in found.items()}

    def named(self, parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return parameters of this module by their names in the state dict, in the given order."""
        names = {parameter: self.published_name(name) for name, parameter in self.named_parameters()}
        return {names[parameter]: parameter for parameter in parameters}

    def groups(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> list[Group]:
        """Return groups of parameters for an optimiser, by the factors of their learning rates."""
        return group_by_rate(self.named(parameters), self._factors, learning_rate)

    def train(self, mode: bool = True) -> TrainingModule:
        """Set the mode; what patterns froze stays in eval mode."""
        super().train(mode)
        if self._has_frozen_parts:
            evaluate_frozen(self.model)
        return self

    # --- the state dict, in the published layout -------------------------------------------------------------------

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Tensor]:
        """Return the state of the model, without a prefix, and beside it what training adds."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in list(state):
            state[prefix + self.published_name(name.removeprefix(prefix))] = state.pop(name)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state in the published layout; names in the result are published ones too. Raises DoesNotFit."""
        state = super().state_dict()
        own = {self.published_name(name): name for name in state}
        shapes = [name for name, value in state_dict.items() if name in own and value.shape != state[own[name]].shape]
        if shapes:
            raise DoesNotFit(f"{type(self).__name__}: of another shape are {some(shapes, 1, width=_OF_A_NAME)}")
        renamed = {own.get(name, self._unknown(name)): value for name, value in state_dict.items()}
        result = super().load_state_dict(renamed, strict=False, assign=assign)
        missing, unexpected = ([self.published_name(name) for name in names] for names in result)
        if strict and (missing or unexpected):
            problems = [("missing", missing), ("unexpected", unexpected)]
            said = "; ".join(f"{what} are {some(names, 1, width=_OF_A_NAME)}" for what, names in problems if names)
            raise DoesNotFit(f"{type(self).__name__}: {said}")
        return type(result)(missing, unexpected)

    def published_name(self, name: str) -> str:
        """Return the name in the state dict of what is called `name` in this module."""
        part, _, rest = name.partition(".")
        return rest if part in self.root_parts else name

    def _unknown(self, name: str) -> str:
        """Place a name that is not ours where it is reported as it is, not where it might hit another part."""
        part = name.partition(".")[0]
        is_ours = part in dict(self.named_children()) and part not in self.root_parts
        return name if is_ours else f"{self.root_parts[0]}.{name}"

    # --- which samples ---------------------------------------------------------------------------------------------

    def numbers(self, first: int, count: int) -> np.ndarray:
        """Number `count` samples of this rank where all ranks together are at number `first`."""
        return first + self.global_rank + self.world_size * np.arange(count)

    def keyed_draws(self, count: int) -> Draws:
        """Start the draws of the next `count` training samples of this rank, and count those of all ranks as seen.

        Dropout masks inside the networks are drawn for a whole batch: they differ with rank and number of ranks.
        """
        seed_device(self.device, seed_from(self.seed, self.global_rank, self.seen))
        draws = Draws.of_samples(self.device, self.numbers(self.seen, count), TRAINING, self.seed)
        self.seen += count * self.world_size
        return draws

    def evaluation_numbers(self, count: int) -> np.ndarray:
        """Number the next `count` samples of this rank within the data set that is evaluated."""
        numbers = self.numbers(self._evaluated, count)
        self._evaluated += count * self.world_size
        return numbers

    def evaluation_draws(self, numbers: np.ndarray) -> Draws:
        """Start the draws of evaluated samples, the same at every evaluation of every run."""
        return Draws.of_samples(self.device, numbers, VALIDATION)

    def on_validation_epoch_start(self) -> None:
        """Begin the data set."""
        self._evaluated = 0

    on_test_epoch_start = on_validation_epoch_start

    # --- steps -----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; a loss that is not finite makes all of them nan, which every rank then gets to know."""
        super().backward(loss * (loss.detach() * 0 + 1), *args, **kwargs)

    def on_after_backward(self) -> None:
        """Refuse, at the first step, an adapter of a layer that has no part in the loss."""
        if self._checks_adapter:
            self._checks_adapter = False
            named = self.named(parameter for part in self.trained_parts() for parameter in part)
            if idle := [name for name, value in named.items() if value.grad is None and is_of_adapter(name)]:
                layers = sorted({name.partition(".lora_")[0] for name in idle})
                raise UserError(f"adapter.modules: no gradient reaches {some(layers, 2, width=80)}; leave it out")
            magnitudes = {name: value for name, value in named.items() if name.endswith(MAGNITUDE)}
            if fixed := [name.removesuffix(MAGNITUDE) for name, value in magnitudes.items() if not value.all()]:
                problem = "outputs whose weights are all 0 have no direction that DoRA could turn; use LoRA there"
                raise UserError(f"adapter.modules: {some(fixed, 1, width=80)}: {problem}")

    def on_train_start(self) -> None:
        """Protect running statistics from what a bad batch does to them; schedules and averages change otherwise."""
        parts = [part for part in self.modules() if part.training and part not in (self, *self.all_averages())]
        self.guard.protect([buffer for part in parts for buffer in part.buffers(recurse=False)])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the parts that are trained on their own, as the trainer says, else by the norm `gradient_clip`."""
        largest = self.gradient_clip if gradient_clip_val is None else gradient_clip_val
        clip_gradients(self.trained_parts(), largest, gradient_clip_algorithm)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the step out if its gradients are not finite."""
        self.guard.check_gradients(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: once per optimiser step, however many batches were accumulated."""
        super().optimizer_step(*args, **kwargs)
        skipped = self.guard.after_step()
        for average in self.all_averages():
            average.update(self.averaged, skipped)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how far the run is, and the means that are not logged yet."""
        checkpoint["samples_seen"], checkpoint["step_guard"] = self.seen, self.guard.state_dict()
        checkpoint["train_means"] = {"means": self._train_means.state_dict(), "logged_step": self._logged_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there; checkpoints that do not say it begin anew."""
        self.seen = int(checkpoint.get("samples_seen", 0))
        if "step_guard" in checkpoint:
            self.guard.load_state_dict(checkpoint["step_guard"])
        if "train_means" in checkpoint:
            self._train_means.load_state_dict(checkpoint["train_means"]["means"], self.device)
            self._logged_step = int(checkpoint["train_means"]["logged_step"])

    # --- the log ---------------------------------------------------------------------------------------------------

    def interval_logs(self) -> dict[str, Tensor]:
        """Return what is logged beside the means since the last time; every rank asks at the same steps."""
        return {}

    def record(self, logs: dict[str, Tensor]) -> None:
        """Add the values of one training batch to the means that are logged."""
        self._train_means.add(logs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the means since the last time, once every `log_every_n_steps` optimiser steps."""
        step = self.global_step
        if step == self._logged_step or step % self.trainer.log_every_n_steps:
            return  # not due, or in the middle of an accumulation
        self._logged_step = step
        self.guard.check_limit(tolerated=_SCALE_SEARCH if self.has_scaler else 0)
        means = self._train_means.take() | self.interval_logs()
        logs = {f"train/{name}": value for name, value in means.items()}
        logs["lr_abs"] = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
        logs["skipped_steps"] = self.guard.num_skipped.float()
        self.log_dict(logs | self._step_count(), batch_size=1)

    def log_means(self, logs: dict[str, Tensor], batch_size: int) -> None:
        """Add values of one evaluated batch to the means over the samples of all ranks."""
        self._evaluation_means.add(logs, batch_size)

    def on_validation_epoch_end(self) -> None:
        """Log the means of the data set. Lightning's own are wrong where ranks have different numbers of samples."""
        names, table = self._evaluation_means.take()
        table = self.trainer.strategy.reduce(table.to(self.device), reduce_op="sum")
        logs = {name: total / count for name, (total, count) in zip(names, table, strict=True)}
        self.log_dict(logs | self._step_count(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the same of the data set `test`."""
        self.on_validation_epoch_end()

    def _step_count(self) -> dict[str, float]:
        """Say where the loggers draw a value; Lightning's own count is one behind."""
        return {"step": float(self.global_step), "epoch": float(self.current_epoch)}
