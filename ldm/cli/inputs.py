"""The files that a program is given: images of a folder, pairs with masks, prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ldm.data.core.decoding import UNREADABLE
from ldm.data.core.files import find_files, find_images, read_lines
from ldm.data.image_pairs.paired_files import find_pairs
from ldm.errors import UserError, some

_log = logging.getLogger(__name__)
_MASK = "_mask"
Value = TypeVar("Value")


class Source(NamedTuple):
    """An image file, its path below the given folder without extension, and the file of its mask."""

    path: Path
    name: str
    mask: Path | None = None


def list_images(place: str, flag: str, endings: Sequence[str] = ()) -> list[Source]:
    """List the images below a folder, or the files with some endings, or the one file. UserError if there are none."""
    path = Path(place).expanduser()
    if path.is_file():
        return [Source(path, path.stem)]
    if not path.is_dir():
        raise UserError(f"{flag} {place}: no such file or folder")
    names = find_files(path, endings) if endings else find_images(path, arrays=True)
    if not names:
        raise UserError(f"{flag} {place}: holds no images{' of ' if endings else ''}{', '.join(endings)}")
    return [Source(path / file, str(Path(file).with_suffix(""))) for file in names]


def list_masked(indir: str) -> list[Source]:
    """List pairs NAME.png, NAME_mask.png below a folder, with any endings, see `find_pairs`. UserError without one."""
    root = Path(indir).expanduser()
    pairs = find_pairs(root, root, _MASK, arrays=True) if root.is_dir() else {}
    if not pairs:
        what = f"no pair NAME.png, NAME{_MASK}.png in it" if root.exists() else "no such file or folder"
        raise UserError(f"--indir {indir}: {what}")
    return [Source(root / name, str(Path(name).with_suffix("")), mask) for name, mask in pairs.items()]


def readable(sources: Sequence[Source], read: Callable[[Source], Value]) -> Iterator[tuple[Source, Value]]:
    """Read one file after the other; unreadable ones are skipped, and logged at the end.

    Raises UserError if none can be read. Other errors, such as a mask of another size, are not caught.
    """
    bad: list[str] = []
    for source in sources:
        try:
            value = read(source)
        except UNREADABLE as error:
            bad.append(f"{source.path} ({error})")
        else:
            yield source, value
    if len(bad) == len(sources):
        raise UserError(f"none of {len(bad)} images can be read: {some(bad)}")
    if bad:
        _log.warning("skipped %d unreadable images: %s", len(bad), some(bad))


def read_prompts(file: str) -> list[str]:
    """Return the lines of a text file that are not empty. Raises UserError if there are none."""
    if prompts := read_lines(Path(file), "give --from-file a text file with a prompt a line"):
        return prompts
    raise UserError(f"--from-file {file}: holds no prompt")
