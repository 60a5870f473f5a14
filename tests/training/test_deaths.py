"""Errors that come of the death of another process are told in the words of that death."""

import os

import pytest

from ldm.training.lightning_fixes.deaths import Deaths

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"


def wrapped(inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise OSError("last.ckpt could not be written") from error
    except OSError as outer:
        return outer


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", ["worker 12", "Killed"]),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", ["worker 12, 13"]),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible", ["worker 12", "/dev/shm"]),
    ],
)
def test_a_dead_worker_is_named(message: str, said: list[str]) -> None:
    deaths = Deaths(1, lambda: "")
    for error in (RuntimeError(message), wrapped(RuntimeError(message))):
        line = deaths.explain(error)
        assert line is not None and all(word in line for word in said) and "lack of memory" not in line


@pytest.mark.skipif(not os.path.exists("/proc/vmstat"), reason="the kernel's counts of kills are in /proc")
def test_lack_of_memory_is_told_where_the_kernel_has_killed_for_it_since() -> None:
    deaths = Deaths(1, lambda: "")
    deaths._kills -= 1  # as if there had been a kill since
    lines = {how: deaths.explain(RuntimeError(f"DataLoader worker (pid 1) is killed by signal: {how}"))
             for how in ("Killed", "Hangup")}  # fmt: skip
    assert "lack of memory" in lines["Killed"] and "lack of memory" not in lines["Hangup"]


def test_a_lost_connection_is_a_death_only_among_several_processes() -> None:
    assert Deaths(1, lambda: "").explain(RuntimeError(GLOO)) is None
    assert Deaths(2, lambda: "").explain(ValueError("Connection reset by peer: http://data/0.tar")) is None
    assert "connection to another rank was lost" in (Deaths(2, lambda: "").explain(RuntimeError(GLOO)) or "")
