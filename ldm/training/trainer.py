"""Lightning's Trainer with our callbacks and loggers, from the section `lightning` of a plan."""

from __future__ import annotations

import warnings
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.config.nodes import is_node
from ldm.errors import ConfigError
from ldm.training.extensions import callbacks, loggers, of_trainer
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.training.plan import Plan
from ldm.training.strategies import STRATEGIES


def build_trainer(plan: Plan) -> pl.Trainer:
    """Build callbacks, loggers and the Trainer. Writes nothing but what a configured logger itself does."""
    lightning, run = plan.lightning, plan.run
    options = lightning["trainer"] | {name: part.build() for name, part in of_trainer(lightning).items()}
    if isinstance(options.get("val_check_interval"), int):
        options.setdefault("check_val_every_n_epoch", None)  # then the interval is counted through all epochs
    if not is_node(plan.strategy):
        options["strategy"] = _strategy(plan.strategy)
    options.setdefault("use_distributed_sampler", False)  # our loaders divide the data among the ranks
    made = [part.build() for part in callbacks(lightning, run)]
    try:
        trainer = pl.Trainer(
            **options,
            callbacks=made,
            logger=[MetricsCsv(run.metrics), *(part.build() for part in loggers(lightning, run))],
            default_root_dir=run.path,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in made),
            enable_model_summary=False,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:  # what it says of its arguments
        raise ConfigError(" ".join(str(error).split()), "lightning.trainer") from error
    # Lightning's answer to SIGTERM, an exception in the middle of a step, is replaced by `lightning_fixes.signals`.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _strategy(name: str) -> Any:
    """Build a strategy; "auto" is left to Lightning, which has one for a single device."""
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is too new
    return STRATEGIES[name]() if name in STRATEGIES else name
