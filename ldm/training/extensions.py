"""What the section `lightning` adds to the trainer: callbacks, checkpoints, loggers, and nodes among its arguments."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from ldm.config import instantiate, validate
from ldm.config.nodes import is_node
from ldm.config.parameters import parameters_of
from ldm.config.targets import find_target
from ldm.config.types import hints_of
from ldm.errors import ConfigError, did_you_mean
from ldm.training.lightning_fixes.checkpoints import Checkpoints
from ldm.training.run_folder import RunFolder

_CHECKPOINTS = "ldm.training.lightning_fixes.checkpoints.Checkpoints"
_CALLBACKS = {
    "image_logger": "ldm.training.callbacks.ImageLogger",
    "progress": "ldm.training.progress.Progress",
    "diagnosis": "ldm.training.diagnosis.AdversarialWarnings",
}


@dataclass(frozen=True)
class Extension:
    """A node with its place, what it has to make, and paths for the parameters that it does not set."""

    node: Mapping[str, Any]
    place: str
    kind: Any
    paths: Mapping[str, Path] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ConfigError for a mistake in the node."""
        validate(self.node, self.place, tuple(self._extra()), self.kind)

    def build(self) -> Any:
        """Build the object. Raises ConfigError."""
        return instantiate(self.node, self.place, self.kind, **self._extra())

    def _extra(self) -> dict[str, Path]:
        known = parameters_of(find_target(self.node["target"], self.place)).names
        given = self.node.get("params")
        given = given if isinstance(given, Mapping) else {}  # the check refuses what is none
        return {name: path for name, path in self.paths.items() if name in known and name not in given}


def check_extensions(lightning: Mapping[str, Any], run: RunFolder) -> None:
    """Check all nodes of the section. Raises ConfigError."""
    for part in (*of_trainer(lightning).values(), *callbacks(lightning, run), *loggers(lightning, run)):
        part.check()


def of_trainer(lightning: Mapping[str, Any]) -> dict[str, Extension]:
    """Return the arguments of the trainer that are nodes."""
    hints = hints_of(pl.Trainer)
    return {
        name: Extension(value, f"lightning.trainer.{name}", hints.get(name))
        for name, value in lightning["trainer"].items()
        if is_node(value)
    }


def callbacks(lightning: Mapping[str, Any], run: RunFolder) -> Iterator[Extension]:
    """Yield the default callbacks, adjusted, replaced or (null) removed by name, further ones, and the checkpoints."""
    configured = lightning.get("callbacks") or {}
    for name in [*_CALLBACKS, *(name for name in configured if name not in _CALLBACKS)]:
        node, place = configured.get(name, {}), f"lightning.callbacks.{name}"
        if node is None:
            if name not in _CALLBACKS and (hint := did_you_mean(name, _CALLBACKS)):
                raise ConfigError(f"there is none of this name to be left out{hint}", place)
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"{node!r} is no node; give params, or null to leave it out", place)
        node = {"target": _CALLBACKS.get(name), **node}
        if node["target"] is None:
            raise ConfigError("needs a target", place)
        yield Extension(node, place, pl.Callback, {"directory": run.images})
    node = {"target": _CHECKPOINTS, **(lightning.get("modelcheckpoint") or {})}
    folders = {"directory": run.checkpoints, "dirpath": run.checkpoints}
    yield Extension(node, "lightning.modelcheckpoint", Checkpoints | pl.callbacks.Checkpoint, folders)


def loggers(lightning: Mapping[str, Any], run: RunFolder) -> Iterator[Extension]:
    """Yield one configured logger, or several by name; by default they write below the run folder."""
    stores = {"MLFlowLogger": run.path / "mlruns"}  # which wants a folder for itself
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 would rather have a database
    configured = lightning.get("logger") or {}
    several = (
        {"lightning.logger": configured}
        if is_node(configured)
        else {f"lightning.logger.{name}": node for name, node in configured.items()}
    )
    for place, node in several.items():
        if node is not None and not is_node(node):
            raise ConfigError("needs a target", place)
        if node is not None:
            name = str(node["target"]).rpartition(".")[2]
            yield Extension(node, place, Logger, {"save_dir": stores.get(name, run.path)})
