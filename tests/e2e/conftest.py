"""What the tests of whole programs share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import write_runs


@contextmanager
def _logging_kept() -> Iterator[None]:
    ours, root = logging.getLogger("ldm"), logging.getLogger()
    level, handlers = ours.level, list(root.handlers)
    yield
    ours.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def logging_kept() -> Iterator[None]:
    """Undo what the command line sets for the whole process."""
    with _logging_kept():
        yield


@pytest.fixture(scope="module", autouse=True)
def logging_kept_by_fixtures() -> Iterator[None]:
    """Undo what programs that a fixture of the module ran have set."""
    with _logging_kept():
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a tiny run of each task, once for all modules; tests read them only."""
    return write_runs(tmp_path_factory.mktemp("runs"))
