"""The files of a study, and what is done only once: trainings and evaluations, called steps here.

OUT/runs/<time>_NAME/       run folders               OUT/evaluations/NAME/   results, a folder each
OUT/done/NAME.json          seconds and result of a finished step
OUT/locks/NAME              held by the process that works on a step
OUT/logs/                   what the processes wrote
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.writing import write_text

_log = logging.getLogger(__name__)


def file_name(text: str) -> str:
    """Return a text as it can be part of the name of a file: letters, digits and dots, at most 40 characters."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text)[:40]


def digest(*parts: Any) -> str:
    """Return eight characters that follow from plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Workspace:
    """Paths below the folder of a study."""

    folder: Path

    def create(self) -> None:
        """Make the folders. UserError if that is impossible."""
        try:
            for kind in ("runs", "evaluations", "logs", "done", "locks"):
                (self.folder / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out: {self.folder}: cannot be made ({error.strerror}); choose another") from error

    def path(self, kind: str, name: str) -> Path:
        """Return a path below the folder `kind`."""
        return self.folder / kind / name

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a step, plain values: do its work unless that was done; another process is waited for.

        The lock is free as soon as the process that holds it has ended, however that was.
        """
        with self.path("locks", name).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("%s: waiting for the process that does it", name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.is_done(name):
                is_first = lock.tell() == 0
                lock.write("attempt\n")
                lock.flush()
                start = time.monotonic()
                result = work()
                self._finish(name, {"seconds": time.monotonic() - start if is_first else None, "result": result})
        return self.result(name)

    def _finish(self, name: str, content: dict[str, Any]) -> None:
        path = self.path("done", f"{name}.json")
        write_text(path, json.dumps(content, indent=2) + "\n")

    def run(self, name: str) -> Path | None:
        """Return the newest run folder of a training that has a checkpoint, None if there is none."""
        runs = sorted((self.folder / "runs").glob(f"*_{name}"))
        return next((run for run in reversed(runs) if (run / "checkpoints" / "last.ckpt").is_file()), None)

    def finished_run(self, name: str) -> Path:
        """Return the run folder of a finished training. UserError if it is gone."""
        run = self.run(name)
        if run is None:
            raise UserError(f"{self.folder / 'runs'}: no run *_{name} with a checkpoint, though it was finished")
        return run

    def is_done(self, name: str) -> bool:
        """Return whether a step is finished."""
        return self.path("done", f"{name}.json").is_file()

    def seconds(self, name: str) -> float | None:
        """Return how long a finished step took; None if it was interrupted."""
        return self._done(name, "seconds")

    def result(self, name: str) -> dict[str, Any]:
        """Return the result of a finished step."""
        return self._done(name, "result")

    def _done(self, name: str, key: str) -> Any:
        path = self.path("done", f"{name}.json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no result of a step ({error}); remove it and run the study again") from error
