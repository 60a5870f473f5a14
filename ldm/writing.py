"""Files and folders that are written whole or not at all, whatever ends the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UMASK = os.umask(0o077)  # which can only be read by setting it
os.umask(_UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, with the same ending, for a file or a folder, which takes its place after the block.

    After an error `path` is what it was, and nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}")
    if beside.is_symlink():  # in a folder of a stranger: it may lead anywhere
        beside.unlink()
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
        raise


def give_usual_rights(path: Path) -> None:
    """Give a file the rights that new files have here; safetensors lets only its owner read."""
    path.chmod(0o666 & ~_UMASK)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
