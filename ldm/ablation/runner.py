"""Run jobs that need one another, each a process of its own, at several places at a time.

A job is locked by its process: the lock file is open in the process itself, so that it stays locked when only the
runner was killed, and is free as soon as the process has ended, however that was. Several runners may therefore work
on one folder; what another one has under way is waited for.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.ablation.workspace import Job, Place, Workspace
from ldm.errors import UserError
from ldm.training.stages import stopped_by_sigterm

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120  # for a training to save when the runner is asked to stop


@dataclass
class _Running:
    job: Job
    place: Place
    process: subprocess.Popen[bytes]
    command: Sequence[str]
    start: float
    is_whole: bool  # nothing was done before


class Runner:
    """Run jobs in the order given as far as their needs allow; finished ones are left alone."""

    def __init__(self, workspace: Workspace, places: Sequence[Place], environment: Mapping[str, str]) -> None:
        workspace.create()
        self.workspace, self.places = workspace, list(places)
        self.environment = {**os.environ, **environment}
        self._running: list[_Running] = []
        self._failed: dict[str, str] = {}

    def is_done(self, name: str) -> bool:
        """Return whether a job was finished, by whomever."""
        return self.workspace.done(name).is_file()

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs. UserError at the end, naming those that failed; the others are finished by then."""
        pending = [job for job in jobs if not self.is_done(job.name)]
        _log.info("%d of %d jobs are to be done", len(pending), len(jobs))
        with stopped_by_sigterm():
            try:
                while pending or self._running:
                    self._collect()
                    pending = self._started(pending)
                    time.sleep(_POLL_SECONDS)
            finally:
                self._stop()
        if self._failed:
            reasons = "; ".join(f"{name} {reason}" for name, reason in self._failed.items())
            raise UserError(f"{len(self._failed)} jobs failed: {reasons}; run the study again to go on")

    def _started(self, pending: list[Job]) -> list[Job]:
        """Start what can be started; return what still waits."""
        waiting: list[Job] = []
        for job in pending:
            lost = [name for name in job.needs if name in self._failed]
            if lost:
                self._failed[job.name] = f"needs {lost[0]}"
            elif self.is_done(job.name):
                continue
            elif not (self._free_places() and all(map(self.is_done, job.needs)) and self._start(job)):
                waiting.append(job)
        return waiting

    def _free_places(self) -> list[Place]:
        free = list(self.places)
        for running in self._running:
            free.remove(running.place)
        return free

    def _start(self, job: Job) -> bool:
        """Start a job; False if another process has it under way."""
        with self.workspace.place("locks", job.name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if self.is_done(job.name):  # another runner finished it since
                return False
            place = self._free_places()[0]
            command = [sys.executable, *job.command(self.workspace, place)]
            _log.info("%s\n    python %s", job.name, shlex.join(command[1:]))
            path = self.workspace.place("logs", f"{job.name}.log")
            is_whole = not path.exists()
            with path.open("ab") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.environment, pass_fds=[lock.fileno()],
                    start_new_session=True,  # Ctrl-C reaches the runner alone, which then asks them to stop
                )  # fmt: skip
        self._running.append(_Running(job, place, process, command, time.monotonic(), is_whole))
        return True

    def _collect(self) -> None:
        """Note which processes have ended, and how."""
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            name, seconds = running.job.name, time.monotonic() - running.start
            try:
                if running.process.returncode:
                    raise UserError(f"ended with status {running.process.returncode}")
                running.job.check(self.workspace)
            except UserError as error:
                self._failed[name] = f"{error}, see {self.workspace.place('logs', f'{name}.log')}"
                _log.error("%s: %s", name, self._failed[name])
                continue
            content = {"command": running.command[1:], "seconds": seconds if running.is_whole else None}
            _write(self.workspace, name, content)
            _log.info("%s: done in %.0f s", name, seconds)

    def _stop(self) -> None:
        """Ask what still runs to save and end, and wait for it."""
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            try:
                running.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                running.process.kill()
        self._running.clear()


def _write(workspace: Workspace, name: str, content: dict[str, Any]) -> None:
    path = workspace.done(name)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
