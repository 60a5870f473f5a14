"""Run jobs that need one another, each in a process of its own, one at a time on each device slot.

A job is locked by its process: the lock file is open in the process itself, so that it stays locked when only the
runner was killed, and is free as soon as the process has ended, however that was. Several runners may therefore work
on one folder; what another one has under way is waited for.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm.ablation.workspace import DeviceSlot, Job, Workspace, write_json
from ldm.config.trust import VARIABLE, allowed
from ldm.errors import UserError
from ldm.training.interrupt import stopped_by_sigterm

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120  # for a training to save when the runner is asked to stop


@dataclass
class _Running:
    job: Job
    slot: DeviceSlot
    process: subprocess.Popen[bytes]
    start: float = field(default_factory=time.monotonic)


class Runner:
    """Run jobs in the order given as far as their needs allow; finished ones are left alone."""

    def __init__(self, workspace: Workspace, slots: Sequence[DeviceSlot]) -> None:
        workspace.create()
        self.workspace, self.slots = workspace, list(slots)
        cores = max((os.cpu_count() or 1) // len(slots), 1)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(cores), VARIABLE: ",".join(allowed())}
        self._running: list[_Running] = []
        self._failed: dict[str, str] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs. UserError at the end, naming those that failed; the others are finished by then."""
        pending = [job for job in jobs if not self.workspace.is_done(job.name)]
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
            elif self.workspace.is_done(job.name):
                continue
            elif not (self._free_slots() and all(map(self.workspace.is_done, job.needs)) and self._start(job)):
                waiting.append(job)
        return waiting

    def _free_slots(self) -> list[DeviceSlot]:
        free = list(self.slots)
        for running in self._running:
            free.remove(running.slot)
        return free

    def _start(self, job: Job) -> bool:
        """Start a job; False if another process has it under way."""
        with self.workspace.path("locks", job.name).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if self.workspace.is_done(job.name):  # another runner finished it since
                return False
            slot = self._free_slots()[0]
            command = self._command(job, slot)
            _log.info("%s\n    python %s", job.name, shlex.join(command[1:]))
            with self.workspace.path("logs", f"{job.name}.log").open("ab") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.environment, pass_fds=[lock.fileno()],
                    start_new_session=True,  # Ctrl-C reaches the runner alone, which then asks them to stop
                )  # fmt: skip
        self._running.append(_Running(job, slot, process))
        return True

    def _command(self, job: Job, slot: DeviceSlot) -> list[str]:
        """Write what a worker reads; return the command of its process."""
        path = self.workspace.path("jobs", f"{job.name}.json")
        content = {"function": job.function, "arguments": job.arguments(self.workspace, slot)}
        write_json(path, {**content, "is_first_attempt": not path.exists()})
        done = self.workspace.path("done", f"{job.name}.json")
        return [sys.executable, "-m", "ldm.ablation.worker", str(path), str(done)]

    def _collect(self) -> None:
        """Note which processes have ended, and how."""
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            name, status = running.job.name, running.process.returncode
            if status == 0 and self.workspace.is_done(name):
                _log.info("%s: done in %.0f s", name, time.monotonic() - running.start)
                continue
            log = self.workspace.path("logs", f"{name}.log")
            self._failed[name] = f"ended with status {status}, see {log}"
            _log.error("%s: %s", name, self._failed[name])

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
