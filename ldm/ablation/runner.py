"""Call functions in processes of their own, one at a time on each device slot; one that fails does not stop the others.

A process outlives a runner that is killed; Ctrl-C reaches the runner alone, which then asks its processes to end.
Nothing heavy is imported here, so that a process begins at once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from ldm.allowance import allowed
from ldm.config.trust import allow
from ldm.errors import UserError
from ldm.training.interrupt import stopped_by_sigterm

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 120  # for a training to save when the runner is asked to stop


@dataclass(frozen=True)
class DeviceSlot:
    """Where one job at a time computes: `device` as torch names it, `options` for trainings (see `RunOptions`).

    threads: CPU threads of the job, None as many as there are.
    """

    device: str
    options: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None


Job = Callable[[DeviceSlot], None]


def run_all(jobs: Mapping[str, Job], slots: Sequence[DeviceSlot], logs: Path) -> None:
    """Call each job by its name with the slot that it runs on; what it writes goes to LOGS/NAME.log.

    UserError at the end, naming the jobs that failed; the others are finished by then.
    """
    context = multiprocessing.get_context("spawn")
    pending, free, failed = dict(jobs), list(slots), {}
    running: dict[SpawnProcess, tuple[str, DeviceSlot, float]] = {}
    with stopped_by_sigterm():
        try:
            while pending or running:
                while pending and free:
                    name, slot = next(iter(pending)), free.pop(0)
                    arguments = (pending.pop(name), slot, logs / f"{name}.log", allowed())
                    process = context.Process(target=_call, args=arguments, name=name)
                    process.start()
                    running[process] = (name, slot, time.monotonic())
                    _log.info("%s on %s: see %s", name, slot.device, arguments[2])
                wait([process.sentinel for process in running])
                for process in [process for process in running if process.exitcode is not None]:
                    name, slot, start = running.pop(process)
                    free.append(slot)
                    if process.exitcode == 0:
                        _log.info("%s: done in %.0f s", name, time.monotonic() - start)
                    else:
                        failed[name] = f"ended with status {process.exitcode}"
                        _log.error("%s: %s, see %s", name, failed[name], logs / f"{name}.log")
        finally:
            _stop(list(running))
    if failed:
        reasons = "; ".join(f"{name} {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(jobs)} failed: {reasons}; see {logs}, run the study again to go on")


def _call(job: Job, slot: DeviceSlot, log: Path, packages: Sequence[str]) -> None:
    """Be the process of a job, whose configs may name `packages`."""
    os.setsid()
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ldm").setLevel(logging.INFO)
    try:
        for package in packages:
            allow(package)
        job(slot)
    except UserError as mistake:
        sys.exit(f"error: {mistake}")


def _stop(processes: Sequence[SpawnProcess]) -> None:
    """Ask processes to save and end, and wait for them."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(_GRACE_SECONDS)
        process.kill()
