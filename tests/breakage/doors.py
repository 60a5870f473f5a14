"""Every door for a file of weights, tried in a process of its own whose memory and time are watched."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from breakage.weights import CANARY, WEIGHTS
from tiny import autoencoder_config, latent_diffusion_config, unet_config

from ldm.config import instantiate
from ldm.errors import UserError
from ldm.models.loading import ModelSource, load_first_stage, load_model
from ldm.models.saving import export_run
from ldm.networks.perceptual import LPIPS
from ldm.toy.scene_extractor import SceneNet
from ldm.training.lightning_fixes.checkpoints import CheckpointFiles
from ldm.weights import files
from ldm.weights.load import load_into, locate, read

MEGABYTES, SECONDS = 500, 20
_ADDRESSES = 3 << 30  # bytes beyond those in use, which no attempt may ask for


def doors(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """Return the doors; they keep what they need in `folder`."""
    model = latent_diffusion_config(unet_config(), autoencoder_config())["params"]["model"]
    (folder / "configs").mkdir()
    config = folder / "configs" / "config.yaml"
    config.write_text(yaml.safe_dump({"model": model}))
    metric, image = LPIPS(), torch.zeros(1, 3, 16, 16)
    module = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 3)})

    def frozen(path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b""
        entry = {"sha256": sha256(content).hexdigest(), "names": {"a": "a"}}
        files.frozen_file(folder, entry).unlink(missing_ok=True)
        files.frozen_file(folder, entry).symlink_to(path)
        files.restore_frozen({"state_dict": {}, files.FROZEN: entry}, folder / path.name)

    def lpips(path: Path) -> None:
        metric.weights = str(path)
        metric(image, image)

    def node(path: Path) -> None:
        instantiate({**autoencoder_config(), "checkpoint": str(path)})

    return {
        "read": read,
        "resume": CheckpointFiles().load_checkpoint,
        "locate": lambda path: locate(folder_with(path, folder)),
        "load_into": lambda path: load_into(module, path),
        "sample": lambda path: load_model(ModelSource(config=config, checkpoint=path)),
        "sample with its config": lambda path: load_model(path),
        "first stage": lambda path: load_first_stage(ModelSource(config=config, checkpoint=path)),
        "a node of a config": node,
        "export": lambda path: export_run(folder_with(path, folder), folder / "out.safetensors"),
        "LPIPS": lpips,
        "scenenet": lambda path: SceneNet(path).hash,
        "frozen parts": frozen,
    }


def folder_with(path: Path, folder: Path) -> Path:
    """Return a run folder whose only checkpoint is this file."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").symlink_to(path)
    shutil.copytree(folder / "configs", run / "configs")
    return run


@dataclass(frozen=True)
class Attempt:
    """What came of a file at a door: the message of a refusal, or None where it was taken; what else is wrong."""

    kind: str
    door: str
    message: str | None
    problems: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} at {self.door}: {'; '.join(self.problems)} [{self.message}]"


def attempts(cases: Iterable[tuple[str, Path, Iterable[str]]], folder: Path) -> Iterator[Attempt]:
    """Try files at doors, given as kind, path and names of doors, in a forked process, which may die of it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(list(cases), folder, theirs))
    process.start()
    theirs.close()
    kind, door = "", ""
    try:
        while True:
            kind, door = ours.recv()
            if not kind:
                break
            yield ours.recv()
    except EOFError:
        process.join()
        yield Attempt(kind, door, None, (f"the process died: {process.exitcode}",))
    process.join()


class TooLong(BaseException):
    """An attempt takes longer than it may."""


def _stop(*_: Any) -> None:
    raise TooLong


def _try_all(cases: list[tuple[str, Path, Iterable[str]]], folder: Path, out: Any) -> None:
    os.chdir(folder)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _stop)
    known = doors(folder)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _ADDRESSES, resource.RLIM_INFINITY))
    for kind, path, names in cases:
        for name in names:
            out.send((kind, name))
            out.send(_attempt(kind, name, known[name], path))
    out.send(("", ""))


def _attempt(kind: str, name: str, door: Callable[[Path], Any], path: Path) -> Attempt:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, problems, message = _peak(), [], None
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing, whatever else this machine does
    signal.alarm(6 * SECONDS)  # ... and for what waits
    try:
        taken = door(path)
    except UserError as error:
        message = str(error)
        problems += _faults(message)
    except TooLong:
        problems.append(f"took more than {SECONDS} s")
    except BaseException:
        problems.append(traceback.format_exc(limit=-3))
    else:
        alike = [key for key in WEIGHTS if name == "read" and key in taken and taken[key].dtype == WEIGHTS[key].dtype]
        if not all(torch.equal(taken[key], WEIGHTS[key]) for key in alike):
            problems.append("other values")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    grown = (_peak() - before) / 1024
    if grown > MEGABYTES:
        problems.append(f"+{grown:.0f} MB")
    if Path(CANARY).exists():
        problems.append("code was run")
        Path(CANARY).unlink()
    return Attempt(kind, name, message, tuple(problems))


def _peak() -> int:
    """Return the most memory that this process had, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _faults(message: str) -> list[str]:
    faults = {
        "more than one line, or signs that do not print": not message.isprintable(),
        "more than 300 characters": len(message) > 300,
        "advice to switch safety off": "weights_only" in message or "torch.load" in message,
        "it only ran out of memory": "MemoryError" in message or "alloc" in message,
        "no word": not message.strip(),
    }
    return [fault for fault, is_there in faults.items() if is_there]
