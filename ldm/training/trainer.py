"""Lightning's Trainer with our callbacks and loggers, from the section `lightning` of a plan."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.config import instantiate
from ldm.config.targets import find_target, parameters_of
from ldm.errors import ConfigError
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.training.plan import Plan
from ldm.training.strategies import STRATEGIES

_log = logging.getLogger(__name__)
_CHECKPOINTS = "ldm.training.lightning_fixes.checkpoints.Checkpoints"
_CALLBACKS = {
    "image_logger": "ldm.training.callbacks.ImageLogger",
    "progress": "ldm.training.progress.Progress",
    "diagnosis": "ldm.training.diagnosis.AdversarialWarnings",
}


def build_trainer(plan: Plan) -> pl.Trainer:
    """Build callbacks, loggers and the Trainer. Writes nothing but what a configured logger itself does."""
    options = {key: _built(value, f"lightning.trainer.{key}") for key, value in plan.lightning["trainer"].items()}
    if isinstance(options.get("val_check_interval"), int):
        options.setdefault("check_val_every_n_epoch", None)  # then the interval is counted through all epochs
    options["strategy"] = _strategy(plan)
    options.setdefault("use_distributed_sampler", False)  # our loaders divide the data among the ranks
    callbacks = [*_callbacks(plan), _checkpoints(plan)]
    loggers = [MetricsCsv(plan.run.metrics), *_loggers(plan)]
    try:
        trainer = pl.Trainer(
            **options,
            callbacks=callbacks,
            logger=loggers,
            default_root_dir=plan.run.path,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_model_summary=False,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:  # what it says of its arguments
        raise ConfigError(" ".join(str(error).split()), "lightning.trainer") from error
    # Lightning's answer to SIGTERM, an exception in the middle of a step, is replaced by `lightning_fixes.signals`.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _built(value: Any, path: str) -> Any:
    return instantiate(value, path) if isinstance(value, dict) and "target" in value else value


def _strategy(plan: Plan) -> Any:
    """Build the strategy; "auto" is left to Lightning, which has one for a single device."""
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is too new
    if isinstance(plan.strategy, dict):
        return instantiate(plan.strategy, "lightning.trainer.strategy")
    return STRATEGIES[plan.strategy]() if plan.strategy in STRATEGIES else plan.strategy


def _callbacks(plan: Plan) -> Iterable[pl.Callback]:
    """Build the default callbacks, adjusted, replaced or (null) removed by name, and further ones."""
    configured = plan.lightning.get("callbacks") or {}
    for name in [*_CALLBACKS, *(name for name in configured if name not in _CALLBACKS)]:
        node, path = configured.get(name, {}), f"lightning.callbacks.{name}"
        if node is None:
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"{node!r} is no node; give params, or null to leave it out", path)
        node = {"target": _CALLBACKS.get(name), **node}
        if node["target"] is None:
            raise ConfigError("needs a target", path)
        yield _with_paths(node, path, directory=plan.run.images)


def _checkpoints(plan: Plan) -> pl.Callback:
    node = {"target": _CHECKPOINTS, **(plan.lightning.get("modelcheckpoint") or {})}
    folder = plan.run.checkpoints
    return _with_paths(node, "lightning.modelcheckpoint", directory=folder, dirpath=folder)


def _loggers(plan: Plan) -> Iterable[pl.loggers.Logger]:
    """Build one configured logger, or several by name; by default they write below the run folder."""
    configured = plan.lightning.get("logger") or {}
    several = {"logger": configured} if "target" in configured else configured
    for name, node in several.items():
        path = "lightning.logger" if "target" in configured else f"lightning.logger.{name}"
        if node is not None:
            yield _with_paths(node, path, save_dir=plan.run.path)


def _with_paths(node: dict[str, Any], path: str, **paths: Path) -> Any:
    """Build a node; paths that its target takes as parameters and that it does not set are filled in."""
    known = parameters_of(find_target(node["target"], path)).names
    given = node.get("params") or {}
    extra = {name: value for name, value in paths.items() if name in known and name not in given}
    return instantiate({**node, "params": given}, path, **extra)
