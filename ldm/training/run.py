"""Train a config as a function: `train(config, run)` builds everything, fits, and returns a `RunResult`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path
from traceback import walk_tb
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from ldm.config import instantiate
from ldm.config.nodes import without_checkpoints
from ldm.data.core.latents import CacheSettings
from ldm.data.core.module import DataModule
from ldm.distributed import is_first_process
from ldm.doctor.data_fit import check_data_fits_model, size_problems
from ldm.errors import ConfigError, UserError, lack_of_memory, refused_by_the_system, shown
from ldm.models.loading import UNTRAINED_FIRST_STAGE, train_option
from ldm.training.callbacks import check_previews
from ldm.training.cost import Way, cost_lines
from ldm.training.devices import matmul_precision
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.extensions import callbacks
from ldm.training.latent_cache import LatentCache
from ldm.training.lightning_fixes.checkpoints import LAST, resuming
from ldm.training.lightning_fixes.deaths import Deaths
from ldm.training.lightning_fixes.guard import StepGuard
from ldm.training.lightning_fixes.signals import Interrupted, Stopped, leave_signals_to_us, stoppable
from ldm.training.module import DoesNotFit, TrainingModule
from ldm.training.plan import (
    AS_CONFIGURED,
    Plan,
    RunOptions,
    cache_settings,
    compilation,
    make_plan,
    untrained_first_stage,
)
from ldm.training.randomness import seed_everything
from ldm.training.resumption import Resumption, data_record, settings_changed
from ldm.training.run_folder import RunFolder
from ldm.training.shares import Sharing
from ldm.training.step_timer import StepTimer
from ldm.training.trainer import build_trainer
from ldm.training.vocabulary import fit_tokenizers

_log = logging.getLogger(__name__)
_UNTRAINED = f"{UNTRAINED_FIRST_STAGE}, or set training.allow_untrained_first_stage=true"


@dataclass(frozen=True)
class RunResult:
    """What a training that reached its end left.

    Args:
        folder: the run folder.
        checkpoint: the last checkpoint in it.
        global_step: optimiser steps since the beginning of the run.
        seconds_per_step: median of this process, without validation; nan if no step was left to make.
        metrics: the last value of every metric that was logged.
    """

    folder: Path
    checkpoint: Path
    global_step: int
    seconds_per_step: float
    metrics: Mapping[str, float]


def train(
    config: Mapping[str, Any] | DictConfig,
    run: RunFolder,
    seed: int | None = None,
    options: RunOptions = AS_CONFIGURED,
    test: bool = True,
) -> RunResult:
    """Train a config to its end, and return what it left.

    Args:
        config: sections model, training, data and (optional) lightning, as `ldm.config.load` returns them.
        run: where to write, and what to go on from: `new_run(logs, name)`, `resume_run(folder)` or `choose_run(...)`.
        seed: None takes that of the resumed run, else 23.
        options: devices, precision and other settings that win over the config.
        test: whether the data set `test` is evaluated afterwards, if there is one.

    Raises UserError for mistakes, before anything is written where they can be known; Stopped, with how to go on, if
    a signal asked to stop, and KeyboardInterrupt if Ctrl-C was pressed twice.
    """
    return train_plan(make_plan(config, run, seed, options), test)


def train_plan(plan: Plan, test: bool = True) -> RunResult:
    """Train what is planned; see `train`."""
    plan.check_machine()
    if problem := first_stage_problem(plan):
        raise UserError(problem)
    precision = matmul_precision(plan.lightning.get("float32_matmul_precision"))
    with stoppable(), precision, plan.run.claimed() as run, _told(replace(plan, run=run)) as plan:
        seed_everything(plan.seed)
        data = build_data(plan)
        model = build_model(plan, data)
        check_data_fits_model(model, data)
        resumption = Resumption(plan, data_record(data))
        content = data.shape_summary()
        trainer, timer = build_trainer(plan), StepTimer()
        check_previews(trainer.callbacks, model)
        trainer.callbacks += [resumption, timer]
        if (settings := cache_settings(plan.lightning)) is not None:
            cache = LatentCache(plan, model, data, settings)
            data = cache.cached_data
            trainer.callbacks.append(cache)
        with run.announced(), _also_written_to(run.log):
            for line in [*describe(plan, model), *content]:
                _log.info(line)
            step, metrics = _fit(trainer, model, data, plan, test)
            if math.isnan(timer.seconds_per_step):
                _log.info("all its %d steps were made before; nothing was left to train: give more max_steps", step)
        return RunResult(run.path, run.checkpoints / LAST, step, timer.seconds_per_step, metrics)


def encode_plan(plan: Plan) -> Path:
    """Cache the training set of a plan; the processes that torchrun started each write their part. Return the folder.

    Raises UserError, as `train` does.
    """
    plan.check_machine()
    if problem := first_stage_problem(plan):
        raise UserError(problem)
    rank, world = int(os.environ.get("RANK", "0")), plan.batch.processes
    if world > 1 and "RANK" not in os.environ:
        raise UserError(f"--devices: start as many processes, torchrun --nproc_per_node {world} scripts/encode.py ...")
    seed_everything(plan.seed)
    data = build_data(plan)
    cache = LatentCache(plan, build_model(plan, data), data, cache_settings(plan.lightning) or CacheSettings())
    if world > 1:
        torch.distributed.init_process_group("gloo")  # files are exchanged, not tensors
    cache.encode(plan.devices.of_process(), rank, world)
    if world > 1:
        torch.distributed.barrier()
    cache.finish(rank == 0)
    return cache.files.folder


def _fit(
    trainer: pl.Trainer, model: TrainingModule, data: DataModule, plan: Plan, test: bool
) -> tuple[int, dict[str, float]]:
    """Return the step at the end of a training, and the last metrics."""
    train, validation = data.train_loader(plan.batch.accumulate), data.validation_loader()
    tested = data.test_loader() if test else None
    for loader in (train, validation, tested):
        if loader is not None:
            leave_signals_to_us(loader)
    with resuming(trainer, plan.run.checkpoint):
        trainer.fit(model, train, validation, ckpt_path=plan.run.checkpoint, weights_only=True)
    step, metrics = trainer.global_step, dict(trainer.callback_metrics)
    if tested is not None:
        trainer.test(model, tested, verbose=False)
        metrics |= trainer.callback_metrics
    return step, {name: float(value) for name, value in metrics.items()}


@contextmanager
def _told(plan: Plan) -> Iterator[Plan]:
    """Say in one line what ended a training before its end, and how it goes on. Yield the plan."""
    run, others = plan.run, set(active_children())
    deaths = Deaths(plan.batch.processes, lambda: run.how_to_go_on)
    try:
        yield plan
    except (Stopped, Interrupted) as stop:
        message = f"{stop}; {run.how_to_go_on}"
        with _also_written_to(run.log):
            _log.info(message)
        raise (Stopped(message) if isinstance(stop, Stopped) else KeyboardInterrupt) from None
    except DoesNotFit as error:
        raise UserError(f"--resume: {error}; settings (of the run, asked for): {settings_changed(plan)}") from error
    except Exception as error:
        if (death := deaths.explain(error)) is not None:
            raise (UserError(f"{death}; {run.how_to_go_on}") if death else SystemExit(1)) from error
        if line := lack_of_memory(error) or refused_by_the_system(error):
            raise UserError(f"{line}; {run.how_to_go_on}") from error
        if isinstance(error, MisconfigurationException) or _is_of_an_extension(error):
            raise ConfigError(shown(" ".join(str(error).split()), 250), "lightning") from error
        if run.log.exists() and not isinstance(error, UserError):  # it trained, or was about to
            with _also_written_to(run.log):
                _log.exception("training ended by an error")
        raise
    finally:
        for worker in set(active_children()) - others:  # one that hangs in a read; it hears no SIGTERM
            worker.kill()


def _is_of_an_extension(error: BaseException) -> bool:
    """Return whether a callback or logger of Lightning, which a config names, raised an error: of its settings."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith(("pytorch_lightning.callbacks", "pytorch_lightning.loggers"))


def first_stage_problem(plan: Plan) -> str:
    """Return why a latent model would be trained on random latents; empty if it would not, or is meant to be."""
    is_allowed = plan.training.get("allow_untrained_first_stage")
    return _UNTRAINED if not is_allowed and untrained_first_stage(plan) else ""


def _parts(module: TrainingModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a training under the names that they have in checkpoints."""
    for name, part in module.named_children():
        if name in module.root_parts:
            yield from part.named_children()
        else:
            yield name, part


def describe(plan: Plan, model: TrainingModule) -> list[str]:
    """Return lines on what is trained, how fast and where."""
    lines = [f"model: {type(model).__name__}"]
    for name, part in _parts(model):
        total = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        if total:
            lines.append(f"  {name}: {total:,} parameters, {trained:,} trained")
        elif isinstance(part, ExponentialMovingAverage):
            lines.append(f"  {name}: {sum(b.numel() for b in part.buffers()):,} averages")
    devices, precision = plan.devices, plan.lightning["trainer"].get("precision", "32")
    return [
        *lines,
        f"learning rate: {plan.learning_rate:g}",
        f"global batch: {plan.batch}",
        f"devices: {devices.accelerator} {devices.devices}, strategy {plan.strategy}, precision {precision}",
        f"run folder: {plan.run.path}",
    ]


def cost_of(plan: Plan, model: TrainingModule, card: float) -> list[str]:
    """Return lines on what a step costs, and the largest batch for a card of so many GiB; uses the model up."""
    return cost_lines(model, *step_settings(plan), card, Sharing.of(plan.strategy, plan.batch.processes))


def step_settings(plan: Plan) -> tuple[int, tuple[int, int] | None, str, Way]:
    """Return what a step costs by: samples of a device, size of the images if it is known, precision, and way.

    The way is that of a card of CUDA, whatever this machine has; compiled blocks are counted by torch's kernels.
    """
    size = train_option(plan.config, "size")
    sides = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
    given = plan.lightning.get("channels_last")
    way = Way(compilation(plan.lightning) is None, not plan.shards_weights if given is None else given)
    return plan.batch.per_device, sides, str(plan.lightning["trainer"].get("precision", 32)), way


def build_data(plan: Plan) -> DataModule:
    """Build the data, its order by the seed of the run unless the config sets another."""
    return instantiate(plan.config["data"], "data")


def build_model(plan: Plan, data: DataModule) -> TrainingModule:
    """Build the model, ready to be trained on `data`: tokenizers fitted, memory format and compilation as asked."""
    # What a run goes on from holds all weights; those that it once started from need not be there any more.
    model = instantiate_training(plan.config if plan.run.is_new else without_checkpoints(plan.config))
    model.learning_rate, model.seed = plan.learning_rate, plan.seed
    if (limit := plan.lightning.get("max_skipped_steps")) is not None:
        model.guard = StepGuard(limit)
    if plan.run.is_new:
        fit_tokenizers(model, data)
    if plan.channels_last:
        model.to(memory_format=torch.channels_last)
    if (settings := compilation(plan.lightning)) is not None:
        settings.apply(model.networks())
    return model


def instantiate_training(config: Mapping[str, Any]) -> TrainingModule:
    """Build the sections `model` and `training` of a config. Raises ConfigError."""
    model = instantiate(config["model"], "model", nn.Module)
    return instantiate(config["training"], "training", TrainingModule, model=model)


def build_without_memory(plan: Plan) -> TrainingModule:
    """Build the training of a plan on the meta device, and check what can be checked of it. Raises UserError."""
    with torch.device("meta"):
        module = instantiate_training(plan.config)
    check_previews([part.build() for part in callbacks(plan.lightning, plan.run)], module)
    if (size := train_option(plan.config, "size")) is not None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        for problem in size_problems(module, *sides):
            raise ConfigError(problem, "data.params.train")
    return module


@contextmanager
def _also_written_to(path: Path) -> Iterator[None]:
    """Append all messages of a block to a file, on the first rank."""
    if not is_first_process():
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None  # on a full disk; the line stands on stderr
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
