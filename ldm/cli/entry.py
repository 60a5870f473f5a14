"""The beginning and end of every program: logging is set up, and a mistake becomes one line and an exit status."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import wraps
from typing import Any, TextIO

from ldm.distributed import is_first_process
from ldm.errors import UserError, lack_of_memory, refused_by_the_system

Main = Callable[[Sequence[str] | None], None]


def main_guard(main: Main) -> Callable[[Sequence[str] | None], int]:
    """Turn a UserError or a lack of memory into one line on stderr with status 1, Ctrl-C into 130; set up logging.

    The function that is returned returns 0 when `main` ends well, and raises SystemExit otherwise.
    """

    @wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        outlive_streams()
        configure_logging()
        try:
            words = expand_homes(sys.argv[1:] if argv is None else argv)
            copy_context().run(main, words)  # what it allows configs to call ends with it
        except UserError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # who read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if not (line := lack_of_memory(error) or refused_by_the_system(error)):
                raise
            sys.stderr.write(f"error: {line}\n")
            sys.exit(1)
        return 0

    return guarded


class _Stderr:
    """Stderr as it is, until it can no longer be written to; from then on it is the null device."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_streams() -> None:
    """Let nothing end because stdout or stderr is closed, or the disk behind stderr is full."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process runs
    if not isinstance(sys.stderr, _Stderr):
        sys.stderr = _Stderr(sys.stderr)


def expand_homes(words: Sequence[str]) -> list[str]:
    """Expand `~/` where words begin with it, and behind `--flag=` and `dotted.key=`, where shells do not."""
    home = r"(?s)^(--[\w-]+=|[\w.\[\]-]+=(?=~[^/]*/)|)(~[\w.-]*(?:/.*)?)$"  # key=~ is null in YAML
    return [re.sub(home, lambda part: part[1] + os.path.expanduser(part[2]), word) for word in words]


def configure_logging() -> None:
    """Write our messages to stderr: all of the first rank, warnings of the others. Lightning's hints are left out."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ldm").setLevel(logging.INFO if is_first_process() else logging.WARNING)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
