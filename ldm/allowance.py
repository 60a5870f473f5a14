"""What somebody allows configs to do here: call packages of one's own, run the commands of shards; a leaf module."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar

VARIABLE = "LDM_ALLOW"
COMMANDS = "pipe:"  # shards that a shell command writes are allowed by this name
_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset())


def add(name: str) -> None:
    """Allow a package or COMMANDS, until the program (see `main_guard`) ends."""
    _allowed.set(_allowed.get() | {name})


def allowed() -> list[str]:
    """List what is allowed, by `--allow` or by the environment variable LDM_ALLOW=NAME,NAME."""
    return [*_allowed.get(), *filter(None, re.split(r"[,\s]+", os.environ.get(VARIABLE, "")))]
