"""Train configs one after the other, as scripts with several stages do."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.train import main as train
from ldm.errors import UserError

_log = logging.getLogger(__name__)


def train_config(config: Path, logs: Path, overrides: Sequence[str], title: str) -> Path:
    """Train a config with `logs` as the folder of runs and return its run folder. UserError if the training failed.

    The command is announced, so that it can be run by itself.
    """
    arguments = ["--base", str(config), "-t", "--logdir", str(logs), "--name", config.stem, *overrides]
    _log.info("\n%s\npython main.py %s\n", title, shlex.join(arguments))
    if train(arguments) != 0:
        raise UserError(f"the training of {config.stem} stopped; its message stands above")
    return max(logs.glob(f"*_{config.stem}"), key=lambda path: path.stat().st_mtime)
