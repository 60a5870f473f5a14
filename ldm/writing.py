"""Files and folders that are written whole or not at all, whatever ends the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
