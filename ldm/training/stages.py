"""Train configs one after the other, as scripts with several stages do."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from ldm import compat
from ldm.errors import UserError
from ldm.training.lightning_fixes.signals import Stopped
from ldm.training.run import train
from ldm.training.run_folder import new_run

_log = logging.getLogger(__name__)


def train_config(config: Path, logs: Path, overrides: Sequence[str], title: str) -> Path:
    """Train a config file with `logs` as the folder of runs, and return the run folder.

    Logs the command that does the same. UserError if the training was asked to stop before its end.
    """
    words = ["--base", str(config), "-t", "--logdir", str(logs), "--name", config.stem, *overrides]
    _log.info("\n%s\npython main.py %s\n", title, shlex.join(words))
    try:
        return train(compat.load(config, overrides), new_run(logs, config.stem)).folder
    except Stopped as stop:
        raise UserError(str(stop)) from stop
