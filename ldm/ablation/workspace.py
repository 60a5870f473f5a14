"""Where the files of a study's jobs are, and what the runner asks of a job: a command that can be run by itself.

    OUT/configs/NAME.yaml       what was trained                 OUT/runs/<time>_NAME/   run folders
    OUT/evaluations/NAME/       results, a folder each           OUT/logs/NAME.log       what the command said
    OUT/done/NAME.json          command and seconds of a finished job
A finished job is never run again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from ldm.errors import UserError

PACE_STEPS = 120  # of the short training; the second half is timed
NUMBERED = "step={:09}.ckpt"


@dataclass(frozen=True)
class Workspace:
    """Name the places of a study's files."""

    folder: Path

    def create(self) -> None:
        """Make the folders."""
        for kind in ("configs", "runs", "evaluations", "logs", "done", "locks"):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)

    def place(self, kind: str, name: str) -> Path:
        """Return a path below the folder `kind`."""
        return self.folder / kind / name

    def config(self, name: str) -> Path:
        """Return the config of a training."""
        return self.place("configs", f"{name}.yaml")

    def run(self, name: str) -> Path | None:
        """Find the newest run folder of a training that has a checkpoint."""
        runs = sorted((self.folder / "runs").glob(f"*_{name}"))
        return next((run for run in reversed(runs) if (run / "checkpoints" / "last.ckpt").is_file()), None)

    def finished_run(self, name: str) -> Path:
        """Find the run folder of a finished training."""
        run = self.run(name)
        if run is None:
            raise UserError(f"{self.folder / 'runs'}: no run *_{name} with a checkpoint, though it was finished")
        return run

    def done(self, name: str) -> Path:
        """Return the file that says that a job is finished."""
        return self.place("done", f"{name}.json")

    def seconds(self, name: str) -> float | None:
        """Return how long a finished job took; None if it was interrupted, since nobody knows then."""
        return json.loads(self.done(name).read_text(encoding="utf-8"))["seconds"]

    def checkpoint(self, name: str, step: int) -> Path:
        """Return the checkpoint that a training kept of a step."""
        return self.finished_run(name) / "checkpoints" / NUMBERED.format(step)

    def steps(self, name: str) -> int:
        """Return how many steps a training makes, as its config says."""
        content = yaml.safe_load(self.config(name).read_text(encoding="utf-8"))
        return int(content["lightning"]["trainer"]["max_steps"])

    def pace(self, name: str) -> float:
        """Tell the seconds of a step of a short training, by the age of its two checkpoints."""
        half, whole = (self.checkpoint(name, step).stat().st_mtime for step in (PACE_STEPS // 2, PACE_STEPS))
        return (whole - half) / (PACE_STEPS - PACE_STEPS // 2)


@dataclass(frozen=True)
class Place:
    """Say where a job computes: `training` for main.py, `device` as torch names it."""

    training: tuple[str, ...]
    device: str


class Job(Protocol):
    """What the runner asks of a job."""

    name: str

    @property
    def needs(self) -> tuple[str, ...]:
        """Name the jobs that must be finished before."""

    def command(self, workspace: Workspace, place: Place) -> list[str]:
        """Write what the command reads, and give the words behind `python`."""

    def check(self, workspace: Workspace) -> None:
        """Raise UserError if the command ended well, but before its end."""
