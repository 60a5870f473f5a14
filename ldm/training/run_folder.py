"""The run folder: its files, a new one, and which one is resumed.

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

from ldm.config.files import read_yaml
from ldm.environment import environment
from ldm.errors import UserError
from ldm.weights.load import locate

_TIME = "%Y-%m-%dT%H-%M-%S"
_TIME_PATTERN = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"
_CONFIG, _ENVIRONMENT = "config.yaml", "environment.json"
AUTO, _SEED = "auto", 23
_FOLDER_OF_THE_FIRST_RANK = "LDM_RUN_FOLDER"  # processes that the first rank starts write, if ever, where it does
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; `checkpoint` is what it goes on from, None for a new run."""

    path: Path
    checkpoint: Path | None = None

    @property
    def is_new(self) -> bool:
        """Return whether this run starts from nothing."""
        return self.checkpoint is None

    @property
    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to go on from."""
        return any(self.checkpoints.glob("*.ckpt"))

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def images(self) -> Path:
        """Return the folder of images."""
        return self.path / "images"

    @property
    def metrics(self) -> Path:
        """Return the file of metrics."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """Return the file of messages."""
        return self.path / "train.log"

    @property
    def saved_config(self) -> Path:
        """Return the config of a run that goes on. UserError if it has none, or one of the first edition."""
        config = self.path / "configs" / _CONFIG
        if not config.is_file():
            raise UserError(f"--resume: {self.path} has no configs/{_CONFIG}; give a run folder of this program")
        content = read_yaml(config)
        if "model" in content and "training" not in content:
            # Its random draws and the state of its optimiser belong to another program.
            raise UserError(
                f"--resume: {self.path} was written before configs had the sections model and training, and cannot go "
                f"on exactly; start a new run: --base {config} -t training.checkpoint={self.path}"
            )
        return config

    def seed(self, given: int | None = None) -> int:
        """Return the seed `given`, else that of the run that goes on, else 23."""
        environment = self.path / "configs" / _ENVIRONMENT
        if given is not None:
            return given
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
        """Let the processes that are started inside the block (the other ranks) write to this folder."""
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
        if self.is_new and not self.metrics.exists() and not self.has_checkpoint:
            shutil.rmtree(self.path, ignore_errors=True)


def choose_run(logdir: str | Path, name: str = "", postfix: str = "", resume: str = "") -> RunFolder:
    """Return the folder of a new run, or the run to go on with. Writes nothing.

    Args:
        logdir: folder of all runs.
        name: follows the time in the name of a new folder; may be empty.
        postfix: ends the name of a new folder.
        resume: a run folder, a checkpoint in one, or "auto": the newest run of this name that has a checkpoint, and a
            new run where there is none. Empty: a new run.

    Raises UserError where there is nothing to resume.
    """
    if resume and resume != AUTO:
        return resume_run(Path(resume).expanduser())
    process, _, inherited = os.environ.get(_FOLDER_OF_THE_FIRST_RANK, "").partition(":")
    if inherited and process != str(os.getpid()):
        given = RunFolder(Path(inherited))
        return resume_run(given.path) if resume and given.has_checkpoint else given
    earlier = _newest_run(Path(logdir), name, postfix) if resume else None
    return earlier or new_run(logdir, name, postfix)


def new_run(logdir: str | Path, name: str = "", postfix: str = "") -> RunFolder:
    """Return a folder `<time>_<name><postfix>` that does not exist yet."""
    stem = datetime.now().strftime(_TIME) + (f"_{name}" if name else "")
    path, number = Path(logdir) / f"{stem}{postfix}", 1
    while path.exists():  # two runs within one second
        number += 1
        path = path.with_name(f"{stem}-{number}{postfix}")
    return RunFolder(path)


def resume_run(given: Path) -> RunFolder:
    """Return the run of a run folder, or of a checkpoint in one. UserError for anything else."""
    if given.is_dir():
        if not RunFolder(given).has_checkpoint:
            raise UserError(f"--resume: {given} has no checkpoints/last.ckpt; it is no run folder or saved nothing")
        return RunFolder(given, locate(given))
    if given.is_file():
        return RunFolder(given.absolute().parent.parent, given)
    raise UserError(f"--resume: {given} does not exist; give a run folder or a checkpoint in one")


def _newest_run(logdir: Path, name: str, postfix: str) -> RunFolder | None:
    """Return the newest run of a name that has a checkpoint, None if there is none."""
    ending = re.escape((f"_{name}" if name else "") + postfix)
    pattern = re.compile(_TIME_PATTERN + ending + r"(-\d+)?")
    runs = sorted((folder for folder in logdir.glob("*") if pattern.fullmatch(folder.name)), reverse=True)
    found = next((folder for folder in runs if RunFolder(folder).has_checkpoint), None)
    if found is None:
        _log.info("--resume auto: %s has no run of this name with a checkpoint; a new one begins", logdir)
        return None
    _log.info("--resume auto: going on with %s", found)
    return resume_run(found)
