"""Signals to processes and groups: a run saves and stops, or leaves nothing; who dies or comes second is named."""

import fcntl
import os
import pty
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
from breakage.processes import EARLY, Scenario, finished, runs, scenarios, start, write_config

from ldm.weights import files as storage

ALL = scenarios()
SOME = ALL[::9]  # nine has no factor in common with their numbers, so that every value of each occurs
QUICK = [
    Scenario("SIGTERM", "group", 2, "diffusion", "step"),
    Scenario("SIGHUP", "process", 0, "diffusion", "save"),
    Scenario("SIGTERM", "process", 0, "autoencoder", "building"),
]


def step_of(run: Path, name: str = "last.ckpt") -> int:
    return storage.load(run / "checkpoints" / name)["global_step"]


def error_of(said: str) -> str:
    """Return the one line of a refusal."""
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(line) <= 300 and said.splitlines()[-1] == line
    return line


# ------------------------------------------------------------------------------------------------------------ signals


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
    assert step_of(run) == {"step": 2, "validation": 3, "save": 3, "test": 6}[scenario.moment]
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("scenario", QUICK, ids=str)
def test_a_signal_saves_at_the_next_step_or_leaves_nothing(scenario: Scenario, tmp_path: Path) -> None:
    check(scenario, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SOME, ids=str)
def test_signals_at_every_moment(scenario: Scenario, tmp_path: Path) -> None:
    check(scenario, tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize("scenario", [scenario for scenario in ALL if scenario not in SOME], ids=str)
def test_signals_at_every_other_moment(scenario: Scenario, tmp_path: Path) -> None:
    check(scenario, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_ctrl_c_stops_at_once_and_says_so(first: str, tmp_path: Path) -> None:
    training = start(tmp_path / "logs", ["-b", str(write_config(tmp_path))], "step", 3)
    training.until_moment()
    training.send(first)
    time.sleep(0.2)
    training.send("SIGINT")
    if first == "SIGTERM":
        time.sleep(0.2)
        training.send("SIGINT")
    assert training.status() == 130  # it was still at its moment
    (run,) = runs(training.logs)
    assert "Ctrl-C again" in training.said and "without a save" in training.said and f"-r {run}" in training.said
    assert step_of(run) == 2 and "Traceback" not in training.said


@pytest.mark.slow
def test_hangup_is_ignored_under_nohup(tmp_path: Path) -> None:
    words = ["-b", str(write_config(tmp_path))]
    training = start(tmp_path / "logs", words, "step", 1, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    training.until_moment()
    training.send("SIGHUP", "group")
    training.go_on()
    assert training.status() == 0
    assert step_of(next(runs(training.logs))) == 6


@pytest.mark.slow
def test_a_run_whose_terminal_is_lost_saves_and_stops(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()

    def on_terminal() -> None:
        os.close(ours)
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        sys.stderr = os.fdopen(theirs, "w", buffering=1)

    words = ["-b", str(write_config(tmp_path)), "lightning.trainer.enable_progress_bar=true"]
    words.append("lightning.callbacks.progress={params: {every_seconds: 0.0}}")
    training = start(tmp_path / "logs", words, "step", 1, on_terminal)
    os.close(theirs)
    training.until_moment()
    os.close(ours)  # the system sends SIGHUP
    training.go_on()
    assert training.status() == 0
    assert step_of(next(runs(training.logs))) == 2


# ------------------------------------------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_loader_worker_that_dies_is_named_with_how_to_go_on(step: int, tmp_path: Path) -> None:
    words = ["-b", str(write_config(tmp_path)), "data.params.num_workers=2"]
    training = start(tmp_path / "logs", words, "step", step)
    training.until_moment()
    worker = training.workers[0]
    os.kill(worker, signal.SIGKILL)
    training.go_on()
    assert training.status() == 1
    line = error_of(training.said)
    assert str(worker) in line and "Killed" in line
    (run,) = runs(training.logs)
    assert ("start it again" if step == 1 else f"main.py -t -r {run}") in line


# --------------------------------------------------------------------------------------------------- folders and owners


def test_a_second_process_is_refused_by_name_and_the_first_goes_on(tmp_path: Path) -> None:
    words = ["-b", str(write_config(tmp_path))]
    first = start(tmp_path / "logs", words, "step", 3)
    first.until_moment()
    (run,) = runs(first.logs)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix != ".log"}
    second = start(tmp_path / "logs", ["-r", str(run)])
    assert second.status() == 1
    assert str(run) in error_of(second.said) and f"process {first.process} on " in second.said
    assert before == {path: path.read_bytes() for path in before}
    first.go_on()
    assert first.status() == 0 and step_of(run) == 6


@pytest.mark.slow
def test_a_killed_owner_leaves_no_lock_though_its_workers_live_on(tmp_path: Path) -> None:
    words = ["-b", str(write_config(tmp_path)), "data.params.num_workers=2"]
    first = start(tmp_path / "logs", words, "step", 3)
    first.until_moment()
    first.send("SIGKILL")
    assert first.status() == -signal.SIGKILL
    (run,) = runs(first.logs)
    finished(tmp_path / "logs", [*words, "--resume", "auto"])
    assert list(runs(first.logs)) == [run] and step_of(run) == 6


@pytest.mark.slow
def test_starts_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    words = ["-b", str(write_config(tmp_path)), "-n", "same", "--max_steps", "2"]
    trainings = [start(tmp_path / "logs", words) for _ in range(3)]
    assert [training.status() for training in trainings] == [0, 0, 0]
    assert [step_of(run) for run in runs(tmp_path / "logs")] == [2, 2, 2]


@pytest.mark.slow
def test_auto_goes_on_with_the_run_that_was_started_last(tmp_path: Path) -> None:
    words, logs = ["-b", str(write_config(tmp_path)), "-n", "one"], tmp_path / "logs"
    finished(logs, [*words, "--max_steps", "2"])
    (first,) = runs(logs)
    first.rename(logs / "2031-01-01T00-00-00_one")  # as if the clock had been set back since
    finished(logs, [*words, "--max_steps", "2"])
    second = next(runs(logs))
    second.rename(logs / "moved")
    finished(logs, [*words, "--resume", "auto", "--max_steps", "3"])
    assert {run.name: step_of(run) for run in runs(logs)} == {"2031-01-01T00-00-00_one": 2, "moved": 3}


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.slow if n == 5 else pytest.mark.proof) for n in range(4, 9)]
)
def test_a_numbered_checkpoint_survives_a_kill_at_any_operation_of_a_save(number: int, tmp_path: Path) -> None:
    """`number`: of the renames of the second save and those around it, the one that is killed."""
    words = ["-b", str(write_config(tmp_path))]

    def prepare() -> None:
        replace, calls = os.replace, []

        def counted(*args: object) -> None:
            calls.append(args)
            if "ckpt" in str(args[1]) and sum("ckpt" in str(call[1]) for call in calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        os.replace = counted

    training = start(tmp_path / "logs", words, before=prepare)
    assert training.status() == -signal.SIGKILL
    finished(tmp_path / "logs", [*words, "--resume", "auto"])
    kept = {path.name for path in (tmp_path / "logs").glob("*/checkpoints/step=*")}
    assert kept == {f"step={step:09}.ckpt" for step in (2, 4, 6)}
