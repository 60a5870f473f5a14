"""Files of weights from strangers: no code, no traceback, one line, little memory, little time, at every door."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from breakage.doors import Attempt, attempts, doors
from breakage.weights import KINDS, SPECIAL, hostile

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc")

DOORS = (
    "read", "resume", "locate", "load_into", "sample", "sample with its config", "first stage", "a node of a config",
    "export", "LPIPS", "scenenet", "frozen parts",
)  # fmt: skip
VARIATIONS = 8


def wrong(tried: list[Attempt]) -> list[str]:
    return [str(attempt)[:2000] for attempt in tried if attempt.problems]


def test_one_file_of_each_kind(tmp_path: Path) -> None:
    """Each at one door; floods are small ones."""
    (tmp_path / "files").mkdir()
    files = enumerate(hostile(tmp_path / "files", 1, share=0.01))
    tried = list(attempts([(kind, path, [DOORS[i % len(DOORS)]]) for i, (kind, path) in files], tmp_path))
    assert not wrong(tried), "\n".join(wrong(tried))
    assert {attempt.kind for attempt in tried} == {*KINDS, *SPECIAL}


@pytest.mark.slow
def test_every_kind_at_full_size(tmp_path: Path) -> None:
    """At the reader alone: floods that take their time until they are refused."""
    (tmp_path / "files").mkdir()
    tried = list(attempts([(kind, path, ["read"]) for kind, path in hostile(tmp_path / "files", 1, seed=2)], tmp_path))
    assert not wrong(tried), "\n".join(wrong(tried))


def try_all(folder: Path, doors_of: Callable[[int], Sequence[str]]) -> None:
    """Try at least 300 files, numbered, at the doors of their numbers."""
    (folder / "files").mkdir()
    files = enumerate(hostile(folder / "files", VARIATIONS, seed=1, share=0.002))
    cases = [(kind, path, doors_of(number)) for number, (kind, path) in files]
    assert len(cases) >= 300
    tried = list(attempts(cases, folder))
    assert not wrong(tried), "\n".join(wrong(tried))
    assert len(tried) == sum(len(names) for _, _, names in cases)


@pytest.mark.slow
def test_every_kind_at_every_door(tmp_path: Path) -> None:
    """Each file at two doors and at two others, in turn: each kind comes to all."""
    others = DOORS[2:]
    try_all(tmp_path, lambda number: (*DOORS[:2], *(others[(2 * number + i) % len(others)] for i in (0, 1))))


@pytest.mark.proof
def test_every_file_at_every_door(tmp_path: Path) -> None:
    try_all(tmp_path, lambda number: DOORS)


def test_every_door_is_tried(tmp_path: Path) -> None:
    assert tuple(doors(tmp_path)) == DOORS
