"""A run that goes on: its state is the checkpoint's, its settings are the config's, and the record says no other.

Works around Lightning 2.6, which restores the settings of an optimiser with its state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sized
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.data.core.base import Contents, ImageReader
from ldm.data.core.derived import source_of
from ldm.data.core.module import DataModule
from ldm.errors import UserError, some
from ldm.evaluation.resumable import differences
from ldm.training.loggers import log_plan
from ldm.training.module import DoesNotFit, TrainingModule
from ldm.training.plan import Plan
from ldm.training.vocabulary import save_tokenizers

_log = logging.getLogger(__name__)
_MOST = 2  # settings in a message
_CONTENT_TOLERANCE = 0.02  # of the mean of an image in [-1, 1]; decoders differ by less
Record = dict[str, dict[str, Any]]


class Resumption(pl.Callback):
    """Reconcile the checkpoint that a run goes on from with its config, and record what it is trained with.

    The record is written before the first step, and not at all if the checkpoint does not fit. Raises UserError.
    """

    def __init__(self, plan: Plan, data: Record) -> None:
        self._plan, self._data = plan, data

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the settings of the config into the optimiser and the schedule that are about to be restored.

        The state belongs to parameters by name: other factors of learning rates, and so other groups, are settings too.
        """
        made = checkpoint["global_step"]
        if 0 <= trainer.max_steps < made:
            raise UserError(f"max_steps: {trainer.max_steps} asked for, but the run has made {made} steps; give more")
        progress = checkpoint["loops"]["fit_loop"]
        _check_counts(progress, trainer.fit_loop.state_dict(), "loops")
        epochs = progress["epoch_progress"]["current"]["processed"]
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < epochs:
            raise UserError(f"max_epochs: {trainer.max_epochs} asked for, but the run has made {epochs}; give more")
        configured = pl_module.configure_optimizers()
        optimizer, steps = configured["optimizer"], configured.get("lr_scheduler", {}).get("scheduler")
        (state,) = checkpoint["optimizer_states"]
        if "trained" in checkpoint:
            _regroup(state, checkpoint["trained"], _trained(pl_module, optimizer))
        groups = (state["param_groups"], optimizer.param_groups)
        saved, asked = ([len(group["params"]) for group in side] for side in groups)
        if saved != asked:
            raise DoesNotFit(f"{type(pl_module).__name__}: the optimiser has groups of {saved} tensors, not of {asked}")
        _check_moments(state["state"], optimizer)
        earlier = checkpoint["lr_schedulers"][:1]
        made = earlier[0]["last_epoch"] if earlier else made
        checkpoint["lr_schedulers"] = [] if steps is None else [_schedule(steps, made)]
        for old, new in zip(*groups, strict=True):
            old |= {name: value for name, value in new.items() if name != "params"}
        for number, rate in enumerate(_rates(checkpoint["lr_schedulers"])):
            state["param_groups"][number]["lr"] = rate

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: TrainingModule, checkpoint: dict[str, Any]) -> None:
        """Note what the state of the optimiser belongs to."""
        checkpoint["trained"] = _trained(pl_module, trainer.optimizers[0])

    def on_train_start(self, trainer: pl.Trainer, pl_module: TrainingModule) -> None:
        """Write the record, also to the loggers; tell what is no longer as it was."""
        if trainer.is_global_zero:
            self._record(pl_module)
            log_plan(trainer.loggers, self._plan)

    def _record(self, module: TrainingModule) -> None:
        plan, run = self._plan, self._plan.run
        if not run.is_new:
            if changed := settings_changed(plan):
                _log.info("settings that changed (before, now): %s", changed)
            if (seed := run.environment().get("seed")) not in (None, plan.seed):
                _log.warning("the seed was %s before, and is %d from here on", seed, plan.seed)
            if changes := data_changes(run.environment().get("data"), self._data):
                _log.warning("the data changed since the run was last started: %s", "; ".join(changes))
        run.record(plan.written, plan.seed, self._data)
        save_tokenizers(module, run.configs)


def settings_changed(plan: Plan) -> str:
    """Return what differs between the config of a run that goes on and the one that it is to go on with."""
    return some(differences(plan.run.saved_content() or {}, plan.written), _MOST, "; ")


def tell_edits(plan: Plan, plan_anew: Callable[[], Plan]) -> None:
    """Warn where a run that goes on by its own config is not what the files of its first start say by now."""
    try:
        edits = some(differences(plan.config, plan_anew().config), _MOST, "; ")
    except UserError as error:
        edits = str(error)
    if edits:
        _log.warning("--resume auto: the run keeps its own settings, --base says otherwise (run, --base): %s", edits)


def _check_counts(found: Any, expected: Any, place: str) -> None:
    """Raise TypeError where the progress of a run is no number: Lightning takes it as it is, and fails at some step."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() & expected.keys():
            _check_counts(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, (int, dict)) and type(found) is not type(expected):
        raise TypeError(f"{place} is a {type(found).__name__}")


def _check_moments(states: Mapping[int, Any], optimizer: Optimizer) -> None:
    """Raise an error where the state of Adam is none of its parameters, which it would find out at the first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in states.items() if isinstance(optimizer, Adam) else ():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            shape = () if name == "step" else parameters[number].shape
            if torch.as_tensor(state[name]).shape != shape:
                raise ValueError(f"{name} of tensor {number} has another shape than {list(shape)}")


def _trained(module: TrainingModule, optimizer: Optimizer) -> dict[str, Any]:
    """Return the class of an optimiser, and the names of its parameters by groups."""
    kind = type(getattr(optimizer, "optim", optimizer)).__name__  # within zero1's
    return {"by": kind, "names": [list(module.named(group["params"])) for group in optimizer.param_groups]}


def _regroup(state: dict[str, Any], saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Number the state of an optimiser as its parameters are grouped now. DoesNotFit for other parameters."""
    if saved["by"] != asked["by"]:
        problem = f"the run was trained by {saved['by']}, whose state {asked['by']} cannot use"
        raise DoesNotFit(f"training.params: {problem}; start a new run from it: training.checkpoint=RUN")
    before, now = ([name for group in side["names"] for name in group] for side in (saved, asked))
    if other := sorted({*before} ^ {*now}):
        raise DoesNotFit(f"training.params: the run trains other parameters; one alone has {some(other, 2, width=80)}")
    places = {name: number for number, name in enumerate(before)}
    values = {number: state["state"][places[name]] for number, name in enumerate(now) if places[name] in state["state"]}
    numbers = iter(range(len(now)))
    groups = [{"params": [next(numbers) for _ in names]} for names in asked["names"]]
    kept = state["param_groups"] if saved["names"] == asked["names"] else groups
    state |= {"state": values, "param_groups": kept}


def _schedule(steps: LambdaLR, made: int) -> dict[str, Any]:
    """Return the state of a schedule after so many steps."""
    rates = [base * factor(made) for base, factor in zip(steps.base_lrs, steps.lr_lambdas, strict=True)]
    return {**steps.state_dict(), "last_epoch": made, "_step_count": made + 1, "_last_lr": rates}


def _rates(schedules: list[dict[str, Any]]) -> list[float]:
    return [rate for schedule in schedules for rate in schedule["_last_lr"]]


# --------------------------------------------------------------------------------------------------------------- data


def data_record(data: DataModule) -> Record:
    """Return what tells a data set from another: number of items, a hash of the names, the first item."""
    sets = data.contents().items()
    return {name: _record_of(getattr(data, name), contents, data.first_items[name]) for name, contents in sets}


def _record_of(dataset: Any, contents: Contents, first: Mapping[str, Any]) -> dict[str, Any]:
    content = {}
    if isinstance(source_of(dataset), ImageReader):  # items of others may be random
        content = {key: value for key, value in first.items() if isinstance(value, (str, int))}
        tensors = {key: value for key, value in first.items() if isinstance(value, Tensor)}
        content |= {key: round(float(value.double().mean()), 3) for key, value in tensors.items()}
    return {
        "items": len(dataset) if isinstance(dataset, Sized) else None,
        "contents": contents.names,
        "first": content,
    }


def data_changes(before: Any, now: Record) -> list[str]:
    """Return what differs between two records of data, as far as the first is one."""
    lines = []
    for name, record in now.items():
        old = before.get(name) if isinstance(before, dict) else None
        if not isinstance(old, dict):
            continue
        first = old.get("first") if isinstance(old.get("first"), dict) else {}
        other = [key for key, value in record["first"].items() if key in first and not _is_alike(first[key], value)]
        if old.get("items") != record["items"]:
            lines.append(f"data.params.{name} had {old.get('items')} items, now {record['items']}")
        elif old.get("contents", record["contents"]) != record["contents"]:
            lines.append(f"data.params.{name} has as many items, but other names")
        elif other:
            lines.append(f"data.params.{name} has another {' and '.join(other)} in its first item")
    return lines


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= _CONTENT_TOLERANCE
    return one == other
