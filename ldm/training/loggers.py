"""What loggers get beside metrics: images, the resolved config, and where the run and its evaluations lie.

A logger of Lightning takes metrics by one method, images by none: each has its own. Loggers that show none are left
without; the images of a run are in its folder in any case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pytorch_lightning.core.saving import save_hparams_to_yaml
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from ldm.training.plan import Plan

__all__ = ["log_image", "log_plan"]

_NAME = re.compile(r"[\w./ -]{1,250}")  # of a parameter of MLflow


def log_plan(loggers: Iterable[Logger], plan: Plan) -> None:
    """Give loggers the config of a run, and under `run` the places of its folder, images and evaluations."""
    run = plan.run
    places = {"folder": run.path, "images": run.images, "evaluations": run.evaluations}
    config = {**plan.config, "run": {name: str(path.resolve()) for name, path in places.items()}}
    for logger in loggers:
        _log_config(logger, config)


@singledispatch
def log_image(logger: Logger, name: str, pixels: np.ndarray, step: int) -> None:
    """Show an image, bytes (H, W, 3), under a name such as train/samples."""


@log_image.register
def _(logger: TensorBoardLogger, name: str, pixels: np.ndarray, step: int) -> None:
    logger.experiment.add_image(name, pixels, step, dataformats="HWC")


@log_image.register
def _(logger: WandbLogger, name: str, pixels: np.ndarray, step: int) -> None:
    logger.log_image(name, [pixels], step=step)


@log_image.register
def _(logger: MLFlowLogger, name: str, pixels: np.ndarray, step: int) -> None:
    logger.experiment.log_image(logger.run_id, pixels, artifact_file=f"images/{name}_{step:06}.png")


@singledispatch
def _log_config(logger: Logger, config: Mapping[str, Any]) -> None:
    logger.log_hyperparams(dict(config))


@_log_config.register
def _(logger: TensorBoardLogger, config: Mapping[str, Any]) -> None:
    logger.log_hyperparams(dict(config))
    # Lightning 2.6 has written the file before, without anything in it, and writes it once.
    save_hparams_to_yaml(Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, dict(config))


@_log_config.register
def _(logger: MLFlowLogger, config: Mapping[str, Any]) -> None:
    """Write config.yaml, and as parameters what MLflow takes: short names, and none that the run has already."""
    client, run = logger.experiment, logger.run_id
    client.log_text(run, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), "config.yaml")
    known = client.get_run(run).data.params
    named = {name: value for name, value in _flat(config) if _NAME.fullmatch(name)}
    logger.log_hyperparams({name: value for name, value in named.items() if name not in known})


def _flat(value: Mapping[str, Any], place: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the values of a config with their paths."""
    for key, child in value.items():
        path = f"{place}/{key}" if place else str(key)
        if isinstance(child, Mapping):
            yield from _flat(child, path)
        else:
            yield path, child
