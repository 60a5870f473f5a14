"""Train configs one after the other, as scripts with several stages do."""

import logging
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from ldm.cli.train import main as train
from ldm.errors import UserError

_log = logging.getLogger(__name__)


def train_config(config: Path, logs: Path, overrides: Sequence[str], title: str) -> Path:
    """Train a config with `logs` as the folder of runs and return its run folder.

    The command is announced, so that it can be run by itself. UserError if the training failed, or was asked to stop
    before its end.
    """
    arguments = ["--base", str(config), "-t", "--logdir", str(logs), "--name", config.stem, *overrides]
    _log.info("\n%s\npython main.py %s\n", title, shlex.join(arguments))
    if train(arguments) != 0:
        raise UserError(f"the training of {config.stem} stopped; its message stands above")
    run = max(logs.glob(f"*_{config.stem}"), key=lambda path: path.stat().st_mtime)
    made, wanted = steps_made(run)
    if wanted is not None and made < wanted:
        raise UserError(f"{run} was stopped at step {made} of {wanted}; it goes on with: python main.py -t -r {run}")
    return run


def steps_made(run: Path) -> tuple[int, int | None]:
    """Return how many steps a run made, and how many it was to make, None if its config does not say."""
    content = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True, mmap=True)
    config = yaml.safe_load((run / "configs" / "config.yaml").read_text(encoding="utf-8"))
    return content["global_step"], config["lightning"]["trainer"].get("max_steps")


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, as clusters send it, end a block like Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
