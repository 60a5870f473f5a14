"""Signals to processes and groups: a run saves and stops, or leaves nothing; a process that dies is named."""

import os
import signal
from pathlib import Path

import pytest
from breakage.processes import EARLY, Scenario, Training, runs, scenarios, start, write_config

from ldm.weights import files as storage

ALL = scenarios()
QUICK = [
    Scenario("SIGTERM", "group", 2, "diffusion", "step"),
    Scenario("SIGUSR1", "group", 2, "autoencoder", "validation"),
    Scenario("SIGHUP", "process", 0, "diffusion", "save"),
    Scenario("SIGINT", "group", 0, "diffusion", "before the first step"),
    Scenario("SIGTERM", "process", 0, "autoencoder", "building"),
    Scenario("SIGUSR1", "process", 0, "diffusion", "test"),
]


def check(scenario: Scenario, folder: Path) -> None:
    words = ["-b", str(write_config(folder, scenario.stage)), f"data.params.num_workers={scenario.workers}"]
    training = start(folder / "logs", words, scenario.moment)
    training.until_moment()
    training.send(scenario.signal, scenario.target)
    training.go_on()
    status = training.status()
    assert "Traceback" not in training.said
    if scenario.moment in EARLY:
        assert status == (130 if scenario.signal == "SIGINT" else 0), training.said
        assert not list(runs(training.logs)) and "start it again" in training.said
        return
    assert status == (130 if (scenario.signal, scenario.moment) == ("SIGINT", "test") else 0), training.said
    (run,) = runs(training.logs)
    assert f"-t -r {run}" in training.said
    saved = storage.load(run / "checkpoints" / "last.ckpt")["global_step"]
    assert saved == {"step": 2, "validation": 3, "save": 3, "test": 6}[scenario.moment]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("scenario", QUICK, ids=str)
def test_a_signal_saves_at_the_next_step_or_leaves_nothing(scenario: Scenario, tmp_path: Path) -> None:
    check(scenario, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ALL[::5], ids=str)
def test_signals_at_every_moment(scenario: Scenario, tmp_path: Path) -> None:
    check(scenario, tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize("scenario", [scenario for scenario in ALL if scenario not in ALL[::5]], ids=str)
def test_signals_at_every_other_moment(scenario: Scenario, tmp_path: Path) -> None:
    check(scenario, tmp_path)
