"""Files of weights from strangers: no code, no traceback, one line, little memory, little time, at every door."""

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


@pytest.mark.slow
def test_every_kind_at_every_door(tmp_path: Path) -> None:
    """At least 300 files."""
    (tmp_path / "files").mkdir()
    cases = [(kind, path, DOORS) for kind, path in hostile(tmp_path / "files", VARIATIONS, seed=1, share=0.002)]
    assert len(cases) >= 300
    tried = list(attempts(cases, tmp_path))
    assert not wrong(tried), "\n".join(wrong(tried))
    assert len(tried) == len(cases) * len(DOORS)


def test_every_door_is_tried(tmp_path: Path) -> None:
    assert tuple(doors(tmp_path)) == DOORS
