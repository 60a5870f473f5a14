"""Jobs are real processes: what is finished stays so, whatever was killed, and nothing is done twice at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from line_jobs import Line, do_lines

from ldm.ablation.runner import DeviceSlot, Job, run_all
from ldm.ablation.workspace import Workspace
from ldm.errors import UserError

CPU = DeviceSlot("cpu")


def run(folder: Path, jobs: dict[str, tuple[Line, ...]], slots: int = 1) -> None:
    workspace = Workspace(folder)
    workspace.create()
    calls: dict[str, Job] = {name: partial(do_lines, folder, lines) for name, lines in jobs.items()}
    run_all(calls, [CPU] * slots, folder / "logs")


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split() if (folder / "order").exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_what_jobs_share_is_done_once_and_never_again(tmp_path):
    shared = ("shared", "import time; time.sleep(0.2)")
    jobs = {"one": (shared, ("a", "pass")), "two": (shared, ("b", "pass"))}
    for _ in range(2):
        run(tmp_path, jobs, slots=2)
        assert order(tmp_path)[0] == "shared" and sorted(order(tmp_path)[1:]) == ["a", "b"]
    assert Workspace(tmp_path).result("b") == {"name": "b"}
    assert json.loads((tmp_path / "done" / "shared.json").read_text())["seconds"] > 0


def test_what_failed_is_named_and_the_rest_is_done(tmp_path):
    mistake = ("mistaken", "from ldm.errors import UserError\nraise UserError('was stopped')")
    jobs = {
        "bad": (("bad", "raise SystemExit(3)"), ("after", "pass")),
        "killed": (("killed", "import os; os.kill(os.getpid(), 9)"),),
        "mistaken": (mistake,),
        "good": (("good", "pass"),),
    }
    with pytest.raises(UserError, match=r"3 of 4 .*bad ended with status 3.*status -9.*status 1.*see "):
        run(tmp_path, jobs)
    assert order(tmp_path) == ["bad", "killed", "mistaken", "good"]
    assert (tmp_path / "logs" / "mistaken.log").read_text().splitlines()[-1] == "error: was stopped"
    run(tmp_path, {"bad": (("bad", "pass"), ("after", "pass"))})
    assert order(tmp_path)[-2:] == ["bad", "after"]
    assert Workspace(tmp_path).seconds("bad") is None  # of two attempts nobody knows the time
    assert Workspace(tmp_path).seconds("after") is not None


def in_a_process(out: Path, line: str) -> subprocess.Popen:
    here = Path(__file__).parent
    program = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]}; from test_runner import Path, run; "
    program += f"run(Path({str(out)!r}), {{'job': (('long', {line!r}), ('next', 'pass'))}})"
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)


def test_a_job_outlives_a_killed_runner_and_is_not_done_beside_itself(tmp_path):
    gate = tmp_path / "gate"
    line = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.02)"
    first = in_a_process(tmp_path, line)
    wait_for(lambda: order(tmp_path) == ["long"])
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = in_a_process(tmp_path, line)
    time.sleep(3)
    assert order(tmp_path) == ["long"]  # still locked by the job itself
    gate.touch()
    assert second.wait(60) == 0
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


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out: .*file.*: cannot be made"):
        Workspace(tmp_path / "file" / "out").create()
