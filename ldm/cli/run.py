"""The run folder: where a run writes, what it was made of, and how it goes on.

    logs/<time>_<name><postfix>/
      checkpoints/  last.ckpt, step=000010000.ckpt, best.ckpt
      configs/      config.yaml (resolved), environment.json (seed, versions, command)
      images/       {train,val}/
      metrics.csv   train.log
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from ldm.cli.arguments import Arguments
from ldm.cli.environment import environment
from ldm.errors import UserError

_TIME = "%Y-%m-%dT%H-%M-%S"
_CONFIG = "config.yaml"
_FOLDER_OF_THE_FIRST_RANK = "LDM_RUN_FOLDER"  # processes that the first rank starts write, if ever, where it does
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Name the places of a run; `checkpoint` is what it goes on from, None for a new run."""

    path: Path
    checkpoint: Path | None = None

    @property
    def is_new(self) -> bool:
        """Tell whether this run starts from nothing."""
        return self.checkpoint is None

    @property
    def checkpoints(self) -> Path:
        """Give the folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        """Give the folder of pictures."""
        return self.path / "images"

    @property
    def metrics(self) -> Path:
        """Give the file of metrics."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """Give the file of messages."""
        return self.path / "train.log"

    def configs(self) -> list[str]:
        """List the configs to build a resumed run from, to be put before those of the command line."""
        if self.is_new:
            return []
        config = self.path / "configs" / _CONFIG
        if not config.is_file():
            raise UserError(f"--resume: {self.path} has no configs/{_CONFIG}; give a run folder of this program")
        return [str(config)]

    def create(self, config: Mapping[str, Any], seed: int) -> None:
        """Make the folders and write config and environment; an earlier config of the run is kept under its time."""
        for folder in (self.checkpoints, self.images, self.path / "configs"):
            folder.mkdir(parents=True, exist_ok=True)
        target = self.path / "configs" / _CONFIG
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        if target.exists() and target.read_text(encoding="utf-8") != text:
            target.rename(target.with_name(f"config-{datetime.now().strftime(_TIME)}.yaml"))
        target.write_text(text, encoding="utf-8")
        content = json.dumps({"seed": seed, **environment()}, indent=2)
        target.with_name("environment.json").write_text(content + "\n", encoding="utf-8")

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
        if self.is_new and not any(self.checkpoints.glob("*.ckpt")):
            shutil.rmtree(self.path, ignore_errors=True)


def choose_run(arguments: Arguments) -> RunFolder:
    """Name the folder of a new run, or find the one to go on with. Writes nothing. Raises UserError."""
    if arguments.resume:
        if arguments.name:
            raise UserError("--name and --resume: a run that goes on keeps its name; drop --name")
        return _find(Path(arguments.resume).expanduser())
    process, _, inherited = os.environ.get(_FOLDER_OF_THE_FIRST_RANK, "").partition(":")
    if inherited and process != str(os.getpid()):
        return RunFolder(Path(inherited))
    name = arguments.name or (Path(arguments.base[0]).stem if arguments.base else "")
    stem = datetime.now().strftime(_TIME) + (f"_{name}" if name else "")
    path, number = Path(arguments.logdir) / f"{stem}{arguments.postfix}", 1
    while path.exists():  # two runs within one second
        number += 1
        path = path.with_name(f"{stem}-{number}{arguments.postfix}")
    return RunFolder(path)


def _find(given: Path) -> RunFolder:
    if given.is_dir():
        checkpoint = given / "checkpoints" / "last.ckpt"
        if not checkpoint.is_file():
            raise UserError(f"--resume: {given} has no checkpoints/last.ckpt; it is no run folder or saved nothing")
        return RunFolder(given, checkpoint)
    if given.is_file():
        return RunFolder(given.absolute().parent.parent, given)
    raise UserError(f"--resume: {given} does not exist; give a run folder or a checkpoint in one")
