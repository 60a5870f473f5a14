"""The files of a study's jobs, and what the runner asks of a job.

    OUT/jobs/NAME.json          function and arguments            OUT/runs/<time>_NAME/   run folders
    OUT/evaluations/NAME/       results, a folder each            OUT/logs/NAME.log       what the job wrote
    OUT/done/NAME.json          seconds and result of a finished job
A finished job is never run again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ldm.errors import UserError


@dataclass(frozen=True)
class Workspace:
    """Paths below the folder of a study."""

    folder: Path

    def create(self) -> None:
        """Make the folders."""
        for kind in ("jobs", "runs", "evaluations", "logs", "done", "locks"):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)

    def path(self, kind: str, name: str) -> Path:
        """Return a path below the folder `kind`."""
        return self.folder / kind / name

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
        """Return whether a job is finished."""
        return self.path("done", f"{name}.json").is_file()

    def seconds(self, name: str) -> float | None:
        """Return how long a finished job took; None if it was interrupted."""
        return self._done(name, "seconds")

    def result(self, name: str) -> dict[str, Any]:
        """Return what the function of a finished job returned."""
        return self._done(name, "result")

    def _done(self, name: str, key: str) -> Any:
        path = self.path("done", f"{name}.json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no result of a job ({error}); remove it and run the study again") from error


@dataclass(frozen=True)
class DeviceSlot:
    """Where one job at a time computes: `device` as torch names it, `options` for trainings (see `RunOptions`)."""

    device: str
    options: tuple[tuple[str, str], ...] = ()


class Job(Protocol):
    """A call of a function in a process of its own, with arguments that JSON can hold."""

    name: str

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the names of the jobs that must be finished before."""

    @property
    def function(self) -> str:
        """Return the dotted name of the function."""

    def arguments(self, workspace: Workspace, slot: DeviceSlot) -> dict[str, Any]:
        """Return its arguments, known when the jobs that it needs are finished."""


def write_json(path: Path, content: Any) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
