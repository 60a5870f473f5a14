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
from ldm.ablation.workspace import Place, Workspace
from ldm.errors import UserError

CPU = Place((), "cpu")


@dataclass(frozen=True)
class Program:
    """A job of one line of Python, which appends its name to a file first."""

    name: str
    line: str = "pass"
    needs: tuple[str, ...] = ()

    def command(self, workspace: Workspace, place: Place) -> list[str]:
        note = f"open({str(workspace.folder / 'order')!r}, 'a').write({self.name + ' '!r})"
        return ["-c", f"{note}\n{self.line}"]

    def check(self, workspace: Workspace) -> None:
        if self.line == "unfinished":
            raise UserError("was stopped")


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
        Runner(Workspace(tmp_path), [CPU, CPU], {}).run(jobs)
        assert order(tmp_path) == ["a", "b", "c"]
    assert json.loads((tmp_path / "done" / "a.json").read_text())["seconds"] > 0


def test_what_failed_is_named_with_what_needs_it_and_the_rest_is_done(tmp_path):
    jobs = [Program("bad", "raise SystemExit(3)"), Program("after", needs=("bad",)), Program("good")]
    with pytest.raises(UserError, match=r"2 jobs failed: .*bad ended with status 3, see .*bad.log.*after needs bad"):
        Runner(Workspace(tmp_path), [CPU], {}).run(jobs)
    assert order(tmp_path) == ["bad", "good"]
    mended = [Program("bad"), *jobs[1:]]
    Runner(Workspace(tmp_path), [CPU], {}).run(mended)
    assert order(tmp_path) == ["bad", "good", "bad", "after"]
    assert Workspace(tmp_path).seconds("bad") is None  # of two attempts nobody knows the time


def test_a_command_that_ended_before_its_end_is_not_done(tmp_path):
    job = Program("a", "unfinished")
    with pytest.raises(UserError, match="a was stopped"):
        Runner(Workspace(tmp_path), [CPU], {"PYTHONINSPECT": ""}).run([_Quiet(job)])
    assert not Workspace(tmp_path).done("a").exists()


@dataclass(frozen=True)
class _Quiet:
    """The same job with a command that ends well."""

    job: Program

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def command(self, workspace: Workspace, place: Place) -> list[str]:
        return ["-c", "pass"]

    def check(self, workspace: Workspace) -> None:
        self.job.check(workspace)


RUNNER = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_runner import CPU, Program
from ldm.ablation.workspace import Workspace
from ldm.ablation.runner import Runner
Runner(Workspace(Path({out!r})), [CPU], {{}}).run([Program("long", {line!r}), Program("next", needs=("long",))])
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
    assert order(tmp_path) == ["long", "long", "next"]  # nobody saw the first one end, so it was asked once more


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
    assert (tmp_path / "saved").exists() and not Workspace(tmp_path).done("long").exists()
