"""The run folder: its files, who owns it, a new one, and which one is resumed.

logs/<time>_<name><postfix>/
  checkpoints/  last.ckpt, previous.ckpt, step=000010000.ckpt, best.ckpt, frozen-<hash>.safetensors
  configs/      config.yaml (resolved), environment.json (seed, data, versions, command; which start this was)
  images/       {train,val}/
  evaluations/  the result of each `ldm evaluate` of the run
  metrics.csv   train.log   lock (held by the process that trains)
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from ldm.allowance import flags
from ldm.config.files import EVALUATIONS, read_yaml
from ldm.config.text import sealed
from ldm.distributed import is_first_process
from ldm.environment import ENVIRONMENT, environment, recorded
from ldm.errors import UserError
from ldm.weights.load import locate
from ldm.writing import write_text

_TIME = "%Y-%m-%dT%H-%M-%S"
_TIME_PATTERN = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"
_CONFIG = "config.yaml"
AUTO, _SEED = "auto", 23
_FOLDER_OF_THE_FIRST_RANK = "LDM_RUN_FOLDER"  # processes that the first rank starts write, if ever, where it does
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; `checkpoint` is what it goes on from, None for a new run, which has `name` and `postfix`."""

    path: Path
    checkpoint: Path | None = None
    name: str = ""
    postfix: str = ""

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
    def configs(self) -> Path:
        """Return the folder of what the run was made with."""
        return self.path / "configs"

    @property
    def images(self) -> Path:
        """Return the folder of images."""
        return self.path / "images"

    @property
    def evaluations(self) -> Path:
        """Return the folder in which evaluations of the run are noted."""
        return self.path / EVALUATIONS

    @property
    def metrics(self) -> Path:
        """Return the file of metrics."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """Return the file of messages."""
        return self.path / "train.log"

    @property
    def how_to_go_on(self) -> str:
        """Say how a run that has ended early goes on."""
        if not self.has_checkpoint:
            return "nothing was saved yet; start it again"
        return f"it goes on with: python main.py -t -r {shlex.quote(str(self.path))}{flags()}"

    # --- what it was made with -------------------------------------------------------------------------------------

    @property
    def saved_config(self) -> Path:
        """Return the config of a run that goes on. UserError if it has none, or one of the first edition."""
        config = self.configs / _CONFIG
        if not config.is_file():
            raise UserError(f"--resume: {self.path} has no configs/{_CONFIG}; give a run folder of this program")
        try:
            content = read_yaml(config)
        except UserError as error:
            raise UserError(f"--resume: {error}{self._older()}") from error
        if not content:
            raise UserError(f"--resume: {config} is empty{self._older()}")
        if "model" in content and "training" not in content:
            # Its random draws and the state of its optimiser belong to another program.
            raise UserError(
                f"--resume: {self.path} was written before configs had the sections model and training, and cannot go "
                f"on exactly; start a new run: --base {config} -t training.checkpoint={self.path}"
            )
        return config

    def _older(self) -> str:
        """Say what could take the place of a damaged config."""
        older = sorted(self.configs.glob("config-*.yaml"))
        return f"; {older[-1].name} is an earlier one" if older else "; or give one by --base in a new run"

    def saved_content(self) -> dict[str, Any] | None:
        """Return what the config of the run says, None where it is absent, empty or damaged."""
        try:
            return read_yaml(self.configs / _CONFIG) or None
        except UserError:
            return None

    def seed(self, given: int | None = None) -> int:
        """Return the seed `given`, else that of the run that goes on, else 23. UserError if that is not known."""
        if given is not None or self.is_new:
            return _SEED if given is None else given
        seed = self.environment().get("seed")
        if type(seed) is not int or not 0 <= seed < 1 << 64:
            file = self.path / ENVIRONMENT
            raise UserError(f"--resume: {file} is missing or damaged; give the run's seed, by default --seed {_SEED}")
        return seed

    def environment(self) -> dict[str, Any]:
        """Return what is known of the circumstances of the run; nothing where the file is absent or damaged."""
        return recorded(self.path)

    def record(self, config: Mapping[str, Any], seed: int, data: Mapping[str, Any]) -> None:
        """Write config and environment; an earlier config of the run is kept under its time. Raises UserError."""
        start = _start_of(self)
        if self.is_new:
            start = {"number": _last_number(self.path.parent) + 1, "name": self.name, "postfix": self.postfix}
            start["folder"] = self.path.name
        target = self.configs / _CONFIG
        text = sealed(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        content = json.dumps({"seed": seed, "start": start, "data": dict(data), **environment()}, indent=2)
        with self._to_be_written():
            for folder in (self.checkpoints, self.images, self.configs):
                folder.mkdir(exist_ok=True)
            if target.exists() and target.read_bytes() != text.encode():
                shutil.copyfile(target, target.with_name(f"config-{datetime.now().strftime(_TIME)}.yaml"))
            write_text(target, text)
            write_text(self.path / ENVIRONMENT, content + "\n")

    # --- who owns it -----------------------------------------------------------------------------------------------

    @contextmanager
    def claimed(self) -> Iterator[RunFolder]:
        """Own the folder inside a block: a new one is made, and no other process trains in it. Yield the run.

        A new run that ends by a mistake or a request before it has saved or measured anything leaves nothing. Raises
        UserError. The ranks of one run share its folder; the first owns it.
        """
        if not is_first_process():
            yield self
            return
        had_parent = self.path.parent.exists()
        run = self._made() if self.is_new else self
        try:
            with run._locked():
                yield run
        except BaseException as error:
            is_crash = isinstance(error, Exception) and not isinstance(error, UserError) and run.log.exists()
            if run.is_new and not (is_crash or run.metrics.exists() or run.has_checkpoint):
                shutil.rmtree(run.path, ignore_errors=True)
                if not had_parent:
                    with suppress(OSError):  # another run lies there by now
                        run.path.parent.rmdir()
            raise

    def _made(self) -> RunFolder:
        """Make the folder, under a number if several runs are made within a second."""
        stem = self.path.name.removesuffix(self.postfix)
        with self._to_be_written():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for number in count(1):
                name = f"{stem}{self.postfix}" if number == 1 else f"{stem}-{number}{self.postfix}"
                try:
                    self.path.with_name(name).mkdir()
                except FileExistsError:
                    continue
                return replace(self, path=self.path.with_name(name))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, which the system frees when this process ends, however that is; forks do not hold it."""
        for file in (self.path / "lock", self.log, self.metrics):  # the folder may come from a stranger
            if file.is_symlink() or (file.exists() and not file.is_file()):
                raise UserError(f"{file}: is a link, a pipe or a folder, and a run writes there; remove it")
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with self._to_be_written():
            file = (self.path / "lock").open("a+", encoding="utf-8")
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    owner = file.read(80).strip() or "another process"
                    raise UserError(f"{self.path}: is being trained by {owner}; wait for it or stop it") from error
                _log.warning("%s: cannot be locked (%s); start no second training in it", self.path, error.strerror)
            with self._to_be_written():
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
            yield

    @contextmanager
    def _to_be_written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --logdir") from error

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


def choose_run(logdir: str | Path, name: str = "", postfix: str = "", resume: str = "") -> RunFolder:
    """Return the folder of a new run, or the run to go on with. Writes nothing.

    Args:
        logdir: folder of all runs.
        name: follows the time in the name of a new folder; may be empty.
        postfix: ends the name of a new folder.
        resume: a run folder, a checkpoint in one, or "auto": the run of this name that was started last of those with a
            checkpoint, and a new run where there is none. Empty: a new run.

    Raises UserError where there is nothing to resume, and for names that are none.
    """
    for flag, value in (("--name", name), ("--postfix", postfix)):
        if "/" in value or os.sep in value:
            raise UserError(f"{flag}: {value!r} is no part of a folder's name; --logdir says where folders are made")
    logdir = Path(logdir).expanduser()
    if resume and resume != AUTO:
        return resume_run(Path(resume).expanduser())
    process, _, inherited = os.environ.get(_FOLDER_OF_THE_FIRST_RANK, "").partition(":")
    if inherited and process != str(os.getpid()):
        given = RunFolder(Path(inherited))
        return resume_run(given.path) if resume and given.has_checkpoint else given
    earlier = _last_started(logdir, name, postfix) if resume else None
    return earlier or new_run(logdir, name, postfix)


def new_run(logdir: str | Path, name: str = "", postfix: str = "") -> RunFolder:
    """Return the folder `<time>_<name><postfix>`, which is made when the run is claimed."""
    stem = datetime.now().strftime(_TIME) + (f"_{name}" if name else "")
    return RunFolder(Path(logdir) / f"{stem}{postfix}", None, name, postfix)


def resume_run(given: Path) -> RunFolder:
    """Return the run of a run folder, or of a checkpoint in one. UserError for anything else."""
    if given.is_dir():
        if not RunFolder(given).has_checkpoint:
            raise UserError(f"--resume: {given} has no checkpoints/last.ckpt; it is no run folder or saved nothing")
        return RunFolder(given, locate(given))
    if given.is_file():
        return RunFolder(given.absolute().parent.parent, given)
    raise UserError(f"--resume: {given} does not exist; give a run folder or a checkpoint in one")


# The starts in a folder of runs are counted: neither a clock that was set back nor a renamed folder changes the order.


def _start_of(run: RunFolder) -> dict[str, Any] | None:
    """Return what is recorded of a start; None for a new run and for those of earlier versions."""
    start = run.environment().get("start")
    number = start.get("number") if isinstance(start, dict) else None
    return start if isinstance(number, int) and 0 <= number < 1 << 63 else None


def _last_number(logdir: Path) -> int:
    return max((start["number"] for path in logdir.glob("*") if (start := _start_of(RunFolder(path)))), default=0)


def _last_started(logdir: Path, name: str, postfix: str) -> RunFolder | None:
    """Return the run of a name that was started last of those with a checkpoint, None if there is none."""
    ending = re.escape(f"_{name}") if name else ""
    pattern = re.compile(_TIME_PATTERN + ending + r"(-\d+)?" + re.escape(postfix))
    found = []
    for path in logdir.glob("*"):
        start = _start_of(RunFolder(path))
        recorded = start is not None and (start.get("name"), start.get("postfix"))
        fits = pattern.fullmatch(path.name) if start is None else recorded == (name, postfix)
        if fits and RunFolder(path).has_checkpoint:
            found.append((0 if start is None else start["number"], path.name, path))
    if not found:
        _log.info("--resume auto: %s has no run of this name with a checkpoint; a new one begins", logdir)
        return None
    newest = max(found)[-1]
    _log.info("--resume auto: going on with %s", newest)
    return resume_run(newest)
