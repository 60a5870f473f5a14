"""The run folder: where a run writes, what it was made of, and how it goes on.

logs/<time>_<name><postfix>/
  checkpoints/  last.ckpt, previous.ckpt, step=000010000.ckpt, best.ckpt, frozen-<hash>.safetensors
  configs/      config.yaml (resolved), environment.json (seed, versions, command)
  images/       {train,val}/
  metrics.csv   train.log
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from ldm.cli.arguments import Arguments
from ldm.environment import environment
from ldm.errors import UserError
from ldm.weights.load import locate

_TIME = "%Y-%m-%dT%H-%M-%S"
_TIME_PATTERN = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"
_CONFIG, _ENVIRONMENT = "config.yaml", "environment.json"
_SEED, _AUTO = 23, "auto"
_FOLDER_OF_THE_FIRST_RANK = "LDM_RUN_FOLDER"  # processes that the first rank starts write, if ever, where it does
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Name the places of a run; `checkpoint` is what it goes on from, None for a new run."""

    path: Path
    checkpoint: Path | None = None

    @property
    def is_new(self) -> bool:
        """Return whether this run starts from nothing."""
        return self.checkpoint is None

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        """Return the folder of pictures."""
        return self.path / "images"

    @property
    def metrics(self) -> Path:
        """Return the file of metrics."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """Return the file of messages."""
        return self.path / "train.log"

    def configs(self, arguments: Arguments) -> list[str]:
        """List the configs to build the run from: its own before those of the command line.

        With `--resume auto`, for which the command line stays that of the first start, its own alone.
        """
        if self.is_new:
            return arguments.base
        config = self.path / "configs" / _CONFIG
        if not config.is_file():
            raise UserError(f"--resume: {self.path} has no configs/{_CONFIG}; give a run folder of this program")
        return [str(config), *(arguments.base if arguments.resume != _AUTO else [])]

    def seed(self, arguments: Arguments) -> int:
        """Return the seed of the command line, else that of the run that goes on, else 23."""
        environment = self.path / "configs" / _ENVIRONMENT
        if arguments.seed is not None:
            return arguments.seed
        if self.is_new or not environment.is_file():
            return _SEED
        return int(json.loads(environment.read_text(encoding="utf-8")).get("seed", _SEED))

    def create(self, config: Mapping[str, Any], seed: int) -> None:
        """Make the folders and write config and environment; an earlier config of the run is kept under its time."""
        try:
            for folder in (self.checkpoints, self.images, self.path / "configs"):
                folder.mkdir(parents=True, exist_ok=True)
            self._describe(config, seed)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --logdir") from error

    def _describe(self, config: Mapping[str, Any], seed: int) -> None:
        target = self.path / "configs" / _CONFIG
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        if target.exists() and target.read_text(encoding="utf-8") != text:
            target.rename(target.with_name(f"config-{datetime.now().strftime(_TIME)}.yaml"))
        target.write_text(text, encoding="utf-8")
        content = json.dumps({"seed": seed, **environment()}, indent=2)
        target.with_name(_ENVIRONMENT).write_text(content + "\n", encoding="utf-8")

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Tell the processes that this one starts inside the block where to write."""
        if _FOLDER_OF_THE_FIRST_RANK in os.environ:  # this is such a process itself
            yield
            return
        os.environ[_FOLDER_OF_THE_FIRST_RANK] = f"{os.getpid()}:{self.path}"
        try:
            yield
        finally:
            del os.environ[_FOLDER_OF_THE_FIRST_RANK]

    def discard(self) -> None:
        """Remove a new run that never made a step."""
        if self.is_new and not self.metrics.exists() and not any(self.checkpoints.glob("*.ckpt")):
            shutil.rmtree(self.path, ignore_errors=True)


def choose_run(arguments: Arguments) -> RunFolder:
    """Name the folder of a new run, or find the one to go on with. Writes nothing. Raises UserError."""
    if arguments.resume and arguments.resume != _AUTO:
        if arguments.name:
            raise UserError("--name and --resume: a run that goes on keeps its name; drop --name")
        return _find(Path(arguments.resume).expanduser())
    process, _, inherited = os.environ.get(_FOLDER_OF_THE_FIRST_RANK, "").partition(":")
    if inherited and process != str(os.getpid()):
        given = RunFolder(Path(inherited))
        return _find(given.path) if arguments.resume and _saved_something(given) else given
    name = arguments.name or (Path(arguments.base[0]).stem if arguments.base else "")
    name = f"_{name}" if name else ""
    if arguments.resume:
        earlier = _newest(Path(arguments.logdir), name + arguments.postfix)
        if earlier is not None:
            return earlier
    stem = datetime.now().strftime(_TIME) + name
    path, number = Path(arguments.logdir) / f"{stem}{arguments.postfix}", 1
    while path.exists():  # two runs within one second
        number += 1
        path = path.with_name(f"{stem}-{number}{arguments.postfix}")
    return RunFolder(path)


def _newest(logdir: Path, ending: str) -> RunFolder | None:
    """Find the newest run of a name that saved something."""
    pattern = re.compile(_TIME_PATTERN + re.escape(ending) + r"(-\d+)?")
    runs = sorted((folder for folder in logdir.glob("*") if pattern.fullmatch(folder.name)), reverse=True)
    found = next((folder for folder in runs if _saved_something(RunFolder(folder))), None)
    if found is None:
        _log.info("--resume auto: %s has no run of this name that saved something; a new one begins", logdir)
        return None
    _log.info("--resume auto: going on with %s", found)
    return _find(found)


def _saved_something(run: RunFolder) -> bool:
    return any(run.checkpoints.glob("*.ckpt"))


def _find(given: Path) -> RunFolder:
    if given.is_dir():
        if not _saved_something(RunFolder(given)):
            raise UserError(f"--resume: {given} has no checkpoints/last.ckpt; it is no run folder or saved nothing")
        return RunFolder(given, locate(given))
    if given.is_file():
        return RunFolder(given.absolute().parent.parent, given)
    raise UserError(f"--resume: {given} does not exist; give a run folder or a checkpoint in one")
