"""Jobs are real processes: what is finished stays so, whatever was killed, and nothing runs twice at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ldm.ablation.runner import Runner
from ldm.ablation.workspace import DeviceSlot, Workspace
from ldm.errors import UserError

CPU = DeviceSlot("cpu")


@pytest.fixture(autouse=True)
def jobs_are_found(monkeypatch):
    """Let the worker processes import tests/line_jobs.py."""
    tests = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))


@dataclass(frozen=True)
class Program:
    """A job of one line of Python, which appends its name to a file first."""

    name: str
    line: str = "pass"
    needs: tuple[str, ...] = ()

    function = "line_jobs.run_line"

    def arguments(self, workspace: Workspace, slot: DeviceSlot) -> dict[str, str]:
        return {"name": self.name, "line": self.line, "folder": str(workspace.folder)}


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split() if (folder / "order").exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_jobs_run_after_what_they_need_and_never_again(tmp_path):
    jobs = [Program("b", needs=("a",)), Program("a"), Program("c", needs=("b",))]
    for _ in range(2):
        Runner(Workspace(tmp_path), [CPU, CPU]).run(jobs)
        assert order(tmp_path) == ["a", "b", "c"]
    assert Workspace(tmp_path).result("b") == {"name": "b"}
    assert json.loads((tmp_path / "done" / "a.json").read_text())["seconds"] > 0


def test_what_failed_is_named_with_what_needs_it_and_the_rest_is_done(tmp_path):
    jobs = [Program("bad", "raise SystemExit(3)"), Program("after", needs=("bad",)), Program("good")]
    with pytest.raises(UserError, match=r"2 jobs failed: .*bad ended with status 3, see .*bad.log.*after needs bad"):
        Runner(Workspace(tmp_path), [CPU]).run(jobs)
    assert order(tmp_path) == ["bad", "good"]
    mended = [Program("bad"), *jobs[1:]]
    Runner(Workspace(tmp_path), [CPU]).run(mended)
    assert order(tmp_path) == ["bad", "good", "bad", "after"]
    assert Workspace(tmp_path).seconds("bad") is None  # of two attempts nobody knows the time


def test_a_process_that_ended_without_a_result_is_not_done(tmp_path):
    with pytest.raises(UserError, match="a ended with status 0, see .*a.log"):
        Runner(Workspace(tmp_path), [CPU]).run([Program("a", "raise SystemExit(0)")])
    assert not Workspace(tmp_path).is_done("a")


def test_a_mistake_is_one_line_in_the_log(tmp_path):
    line = "from ldm.errors import UserError\nraise UserError('was stopped')"
    with pytest.raises(UserError, match="a ended with status 1, see .*a.log"):
        Runner(Workspace(tmp_path), [CPU]).run([Program("a", line)])
    assert (tmp_path / "logs" / "a.log").read_text().splitlines()[-1] == "error: was stopped"


RUNNER = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_runner import CPU, Program
from ldm.ablation.workspace import Workspace
from ldm.ablation.runner import Runner
Runner(Workspace(Path({out!r})), [CPU]).run([Program("long", {line!r}), Program("next", needs=("long",))])
"""


def in_a_process(out: Path, line: str) -> subprocess.Popen:
    text = RUNNER.format(folder=str(Path(__file__).parent), out=str(out), line=line)
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE)


def test_a_job_outlives_a_killed_runner_and_is_not_started_beside_itself(tmp_path):
    gate = tmp_path / "gate"
    line = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.02)"
    first = in_a_process(tmp_path, line)
    wait_for(lambda: order(tmp_path) == ["long"])
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = in_a_process(tmp_path, line)
    time.sleep(1.5)
    assert order(tmp_path) == ["long"]  # still locked by the job itself
    gate.touch()
    assert second.wait(30) == 0
    assert order(tmp_path) == ["long", "next"]  # its result is there, though its runner was not


def test_a_runner_that_is_asked_to_stop_asks_its_jobs_and_waits_for_them(tmp_path):
    line = (
        "import pathlib, signal, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / 'saved')!r}).touch(), exit(0)))\n"
        "time.sleep(60)"
    )
    runner = in_a_process(tmp_path, line)
    wait_for(lambda: order(tmp_path) == ["long"])
    time.sleep(0.3)
    runner.terminate()
    assert runner.wait(30) != 0
    assert (tmp_path / "saved").exists() and not Workspace(tmp_path).is_done("long")
