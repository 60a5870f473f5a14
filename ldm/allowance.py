"""What somebody allows configs to do: call packages of one's own, run commands, write elsewhere; a leaf module."""

from __future__ import annotations

import os
import re
import shlex
from contextvars import ContextVar
from pathlib import Path

VARIABLE = "LDM_ALLOW"
COMMANDS = "pipe:"  # shards that a shell command writes are allowed by this name
VARIABLES = "env:"  # and before a name, that a config may read this variable of the environment
PLACE = "path:"  # and before a folder, that a run may write there, which is outside of its own
_allowed: ContextVar[frozenset[str]] = ContextVar("allowed", default=frozenset())


def add(name: str) -> None:
    """Allow a package, COMMANDS, a place or a variable, until the program (see `main_guard`) ends."""
    _allowed.set(_allowed.get() | {name})


def allowed() -> list[str]:
    """List what is allowed, by `--allow` or by the environment variable LDM_ALLOW=NAME,NAME."""
    return [*_allowed.get(), *filter(None, re.split(r"[,\s]+", os.environ.get(VARIABLE, "")))]


def flags() -> str:
    """Return the flags by which another program of this environment is allowed the same, each after a space."""
    return "".join(f" --allow {shlex.quote(name)}" for name in sorted(_allowed.get()))


def may_write(folder: str | Path) -> bool:
    """Return whether a folder lies in one that is allowed."""
    places = [name.removeprefix(PLACE) for name in allowed() if name.startswith(PLACE)]
    return any(lies_in(folder, place) for place in places)


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Return whether a path is that of a folder or lies below it, links followed."""
    inner, outer = (Path(os.path.realpath(os.path.expanduser(name))) for name in (path, folder))
    return outer in (inner, *inner.parents)
