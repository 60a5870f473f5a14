"""Real trainings in processes of their own, and what comes to a process: signals, deaths, a second process, a clock.

A training is forked from the test after the imports, leads a process group of its own, as under `timeout` or a
scheduler, and runs main.py's command line. At its `moment` it waits for what the test does to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from tiny import autoencoder_training_config, identity_config, latent_diffusion_config, node, run_config, unet_config

from ldm.cli.entry import configure_logging
from ldm.cli.train import main
from ldm.training import run as training

STEPS, EVERY = 6, 2
SECONDS = 60  # until a training that hangs is a failure
PATIENCE = 20  # of a training at its moment, for what the test does
HOOKS = {
    "sanity check": "on_sanity_check_start",
    "before the first step": "on_fit_start",
    "step": "on_train_batch_start",
    "validation": "on_validation_batch_start",
    "save": "on_save_checkpoint",
    "test": "on_test_batch_start",
}
EARLY = ("building", "sanity check", "before the first step")  # nothing is worth a save yet
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")


@dataclass(frozen=True)
class Scenario:
    """A signal to a process or its group, at a moment of a training with so many loader workers."""

    signal: str
    target: str
    workers: int
    stage: str
    moment: str

    def __str__(self) -> str:
        return f"{self.signal} to the {self.target}, {self.workers} workers, {self.stage}, {self.moment}"


def scenarios() -> list[Scenario]:
    """Return every signal, target, number of workers and moment; the two stages take turns."""
    cases = product(SIGNALS, ("process", "group"), (0, 2), ("building", *HOOKS))
    stages = ("diffusion", "autoencoder")
    return [
        Scenario(name, target, workers, stages[number % 2], moment)
        for number, (name, target, workers, moment) in enumerate(cases)
    ]


def write_config(folder: Path, stage: str = "diffusion", **lightning: Any) -> Path:
    """Write the config of a tiny training with validation, a test set, and a save every other step."""
    train, other = (
        node("toy.shapes.Shapes", num_samples=count, size=8, fields=[], split=split)
        for split, count in (("train", 12), ("validation", 4))
    )
    model = autoencoder_training_config()
    if stage == "diffusion":
        model = latent_diffusion_config(unet_config(3), identity_config())
    trainer = {"max_steps": STEPS, "val_check_interval": 3, "num_sanity_val_steps": 1, "enable_progress_bar": False}
    saves = {"params": {"every_n_steps": EVERY, "keep_every_n_steps": EVERY}}
    section = {"trainer": trainer, "modelcheckpoint": saves, "callbacks": {"image_logger": None, "progress": None}}
    config = run_config(model, train, other, lightning={**section, **lightning})
    config["data"]["params"]["test"] = other
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Moment(pl.Callback):
    """Mark a moment once and wait there, so that a signal comes while it lasts."""

    def __init__(self, name: str, mark: Path, step: int) -> None:
        self.mark, self.step, self.is_over = mark, 0 if name in EARLY else step, False
        if name != "building":
            setattr(self, HOOKS[name], self._reached)

    def _reached(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.is_over and not (trainer.sanity_checking and "sanity" not in self.mark.name):
            if trainer.global_step >= self.step:
                self.wait()

    def wait(self) -> None:
        """Return a moment after the test has taken the mark away, by which time its signal has come."""
        self.is_over = True
        self.mark.touch()
        end = time.monotonic() + PATIENCE
        while self.mark.exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)


@dataclass
class Training:
    """A training in a process of its own."""

    process: int
    logs: Path
    output: Path
    mark: Path

    def until_moment(self) -> None:
        """Wait until the training is at its moment."""
        end = time.monotonic() + SECONDS
        while not self.mark.exists():
            assert time.monotonic() < end and os.waitpid(self.process, os.WNOHANG)[0] == 0, self.said
            time.sleep(0.01)

    def send(self, name: str, target: str = "process") -> None:
        """Send a signal to the process or to its group."""
        (os.killpg if target == "group" else os.kill)(self.process, signal.Signals[name])

    def go_on(self) -> None:
        """Let the moment pass."""
        self.mark.unlink()

    def status(self) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        raise AssertionError(f"no end after {SECONDS} s:\n{self.said}")

    @property
    def said(self) -> str:
        """Return what the training has written to stderr."""
        return self.output.read_text()

    @property
    def workers(self) -> list[int]:
        """Return the processes that the training has forked."""
        return [int(pid) for pid in Path(f"/proc/{self.process}/task/{self.process}/children").read_text().split()]


def start(
    logs: Path, words: list[str], moment: str = "", step: int = 1, before: Callable[[], None] | None = None
) -> Training:
    """Fork a process that trains by these words of the command line into `logs`, and waits at a moment."""
    number = len(list(logs.parent.glob("output-*")))
    training = Training(0, logs, logs.parent / f"output-{number}.txt", logs.parent / f"moment-{number} {moment}")
    training.output.touch()
    training.process = os.fork()
    if training.process:
        return training
    status = 70
    try:
        status = _train(training, words, moment, step, before)
    except SystemExit as end:
        status = end.code
    except BaseException:
        logging.getLogger("ldm").exception("ended by an error")
    finally:
        os._exit(status)


def _train(training_: Training, words: list[str], moment: str, step: int, before: Callable[[], None] | None) -> int:
    os.setsid()
    for name in SIGNALS:  # the test's runner may have its own
        signal.signal(signal.Signals[name], signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    file = training_.output.open("a", buffering=1)
    os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    logging.getLogger().handlers.clear()
    with contextlib.redirect_stderr(file):
        configure_logging()
        if before is not None:
            before()
        waits, build = Moment(moment, training_.mark, step) if moment else None, training.build_trainer

        def build_trainer(plan: Any) -> pl.Trainer:
            if moment == "building":
                waits.wait()
            trainer = build(plan)
            trainer.callbacks[:0] = [waits] if waits else []
            return trainer

        training.build_trainer = build_trainer
        return main([*words, "-t", "-l", str(training_.logs)])


def finished(logs: Path, words: list[str]) -> Training:
    """Train to the end, without a moment."""
    training = start(logs, words)
    assert training.status() == 0, training.said
    return training


def runs(logs: Path) -> Iterator[Path]:
    """Return the run folders, oldest name first."""
    return iter(sorted(logs.iterdir())) if logs.exists() else iter(())
