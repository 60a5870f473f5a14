"""Prove that a killed run ends where the uninterrupted one does: real trainings, real SIGKILLs at random moments.

    python scripts/benchmarks/prove_resume.py --kills 40 --seed 0 --faults --out FILE.json

Both stages learn from a folder and from shards, in tiny models with validation, best checkpoints, averages, warm-up
and a discriminator. Each is trained once without interruption; then the same training is killed at random moments and
resumed with `--resume auto` until it ends. Weights, averages, optimisers, schedulers, counters, position in the data
and metrics.csv must be the same to the last bit. `--faults` breaks saving in four ways instead of the process, for all
four trainings. Each training is a process forked from this one after the imports, which runs main.py's command line.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from small_trainings import write_configs

from ldm.cli.entry import configure_logging
from ldm.cli.train import main as train
from ldm.errors import UserError
from ldm.weights import files as storage
from ldm.weights.load import locate

_log = logging.getLogger("ldm.prove_resume")


@dataclass(frozen=True)
class Outcome:
    """One interruption: of which training, by what, when, and what differs from the uninterrupted run."""

    training: str
    by: str
    after_seconds: float
    at_step: int
    differs: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof, print a table and write it; status 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="prove_resume.py", description="Kill and resume trainings, and compare.")
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs in all, over four trainings")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--faults", action="store_true", help="also break the saving of checkpoints in four ways")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    configure_logging()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(_outcomes(Path(folder), options))
    same = sum(not outcome.differs for outcome in outcomes)
    _log.info("%d of %d ended bit-identical to the uninterrupted run", same, len(outcomes))
    if options.out:
        options.out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    return int(same < len(outcomes))


def _outcomes(folder: Path, options: argparse.Namespace) -> Iterator[Outcome]:
    configs = write_configs(folder)
    share = -(-options.kills // len(configs))
    moments = random.Random(options.seed)
    left = options.kills
    for name, config in configs.items():
        start = time.monotonic()
        _finish(config, folder / f"{name}-whole")
        seconds = time.monotonic() - start
        whole = fingerprint(folder / f"{name}-whole")
        number = min(share, left)
        left -= number
        for outcome in _killed(name, config, folder, whole, (number, seconds, moments)):
            yield _logged(outcome)
        for fault in _FAULTS if options.faults else ():
            yield _logged(_broken(name, config, folder, whole, fault))


def _logged(outcome: Outcome) -> Outcome:
    result = outcome.differs or "same"
    _log.info("%-20s %-28s %5.2f s  step %2d  %s", *list(asdict(outcome).values())[:4], result)
    return outcome


def _killed(
    name: str, config: Path, folder: Path, whole: dict[str, Any], plan: tuple[int, float, random.Random]
) -> Iterator[Outcome]:
    """Kill one training again and again, each time going on with what is left; a finished one is compared."""
    kills, seconds, moments = plan
    run, hits = folder / f"{name}-killed", []
    while kills > 0:
        process, wait = _start(config, run), moments.uniform(0, seconds)
        ended = _wait(process, wait)
        if ended is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            hits.append((wait, _step(run)))
            kills -= 1
        if ended is not None or kills == 0:
            _finish(config, run)
            difference = compare(fingerprint(run), whole)
            yield from (Outcome(name, "SIGKILL", *hit, difference) for hit in hits)
            shutil.rmtree(run)
            hits = []


def _broken(name: str, config: Path, folder: Path, whole: dict[str, Any], fault: str) -> Outcome:
    """Train until a save is broken, look for a good checkpoint, and go on."""
    run, start = folder / f"{name}-{fault}", time.monotonic()
    _wait(_start(config, run, lambda: _FAULTS[fault](run)), None)
    step, problem = _step(run), ""
    try:
        locate(_newest(run))
    except UserError as error:
        problem = f"no good checkpoint: {error}"
    _finish(config, run)
    problem = problem or compare(fingerprint(run), whole)
    return Outcome(name, fault, round(time.monotonic() - start, 2), step, problem)


# ---------------------------------------------------------------------------------------------------------- processes


def _start(config: Path, logs: Path, prepare: Callable[[], None] | None = None) -> int:
    """Fork a process that trains as main.py does."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        with (logs.parent / "log.txt").open("a") as file, contextlib.redirect_stderr(file):
            logging.getLogger().handlers[0].setStream(file)
            if prepare is not None:
                prepare()
            code = train(["-b", str(config), "-t", "-l", str(logs), "--resume", "auto"])
    except Exception:
        _log.exception("%s", logs.name)
    finally:
        os._exit(code)


def _wait(process: int, seconds: float | None) -> int | None:
    """Return the exit status, None if the process still runs after so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _finish(config: Path, logs: Path) -> None:
    status = _wait(_start(config, logs), None)
    if status != 0:
        raise RuntimeError(f"{logs.name}: the training ended with status {status}; see {logs.parent / 'log.txt'}")


def _newest(logs: Path) -> Path:
    """Find the run that goes on; one that was killed before it saved anything stays behind. ValueError for none."""
    return max(file.parents[1] for file in logs.glob("*/checkpoints/last.ckpt"))


def _step(logs: Path) -> int:
    """Return the step from which a run would go on."""
    try:
        return int(storage.load(locate(_newest(logs)))["global_step"])
    except (UserError, ValueError):
        return 0


# ------------------------------------------------------------------------------------------------------------- faults


def _on_call(function: str, number: int, act: Callable[[Any], None]) -> None:
    """Run `act` before one call of os.<function> on last.ckpt."""
    original, calls = getattr(os, function), []

    def changed(*args: Any) -> Any:
        target = os.readlink(f"/proc/self/fd/{args[0]}") if function == "fsync" else str(args[0])
        if "last.ckpt" in target:
            calls.append(target)
            if len(calls) == number:
                act(target)
        return original(*args)

    setattr(os, function, changed)


def _fail(code: int) -> Callable[[Any], None]:
    def act(target: str) -> None:
        raise OSError(code, os.strerror(code), target)

    return act


def _die(target: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _truncate_newest(run: Path) -> None:
    """Cut the second checkpoint short while the third is written, and die: what a broken disk may leave."""

    def act(target: str) -> None:
        newest = _newest(run) / "checkpoints" / "last.ckpt"
        os.truncate(newest, newest.stat().st_size // 2)
        _die(target)

    _on_call("fsync", 3, act)


_FAULTS: dict[str, Callable[[Path], None]] = {
    "disk full (ENOSPC)": lambda run: _on_call("fsync", 2, _fail(errno.ENOSPC)),
    "disk error (EIO)": lambda run: _on_call("fsync", 2, _fail(errno.EIO)),
    "killed before the rename": lambda run: _on_call("replace", 2, _die),
    "newest file truncated": _truncate_newest,
}


# --------------------------------------------------------------------------------------------------------- comparison


def fingerprint(logs: Path) -> dict[str, Any]:
    """Return all that the end of a run consists of, under flat names."""
    run = _newest(logs)
    folder, flat = run / "checkpoints", {}
    for file in ("last.ckpt", "best.ckpt"):
        content = storage.load(folder / file)
        loops = content.pop("loops")["fit_loop"]
        # Lightning's count of validation batches through an epoch, and of logging events, drive nothing of ours.
        kept = {key: value for key, value in loops.items() if "val_loop" not in key and "epoch_loop.state" not in key}
        flat |= dict(_flatten({**content, "loops": kept}, file))
    numbered = sorted(path.name for path in folder.glob("step=*"))
    return flat | {"metrics.csv": (run / "metrics.csv").read_bytes(), "numbered": " ".join(numbered)}


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flatten(child, f"{name}: {key}")
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from _flatten(child, f"{name}: {index}")
    else:
        yield name, value


def compare(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the names of what differs; empty if nothing does."""
    names = [name for name in one.keys() | other.keys() if not _same(one.get(name), other.get(name))]
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


if __name__ == "__main__":
    raise SystemExit(main())
