"""The files that a program is given: images of a folder, pairs with masks, prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ldm.data.core.decoding import UNREADABLE
from ldm.data.readers.folders import EXTENSIONS, find_files
from ldm.errors import UserError

_log = logging.getLogger(__name__)
_MASK = "_mask"
IMAGE_EXTENSIONS = (*EXTENSIONS, ".npy")
Value = TypeVar("Value")


class Source(NamedTuple):
    """An image file, its path below the given folder without extension, and the file of its mask."""

    path: Path
    name: str
    mask: Path | None = None


def list_images(place: str, flag: str, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> list[Source]:
    """List the images below a folder, or the one file. Raises UserError if there are none."""
    path = Path(place).expanduser()
    if path.is_file():
        return [Source(path, path.stem)]
    if not path.is_dir():
        raise UserError(f"{flag} {place}: no such file or folder")
    found = [Source(path / file, str(Path(file).with_suffix(""))) for file in find_files(path, extensions)]
    if not found:
        raise UserError(f"{flag} {place}: holds no images ({', '.join(extensions)})")
    return found


def list_masked(indir: str) -> list[Source]:
    """List pairs NAME.png, NAME_mask.png below a folder, with any extensions; single files are skipped and logged.

    Raises UserError if there is no pair.
    """
    files = {source.name: source.path for source in list_images(indir, "--indir")}
    images = {name: path for name, path in files.items() if not name.endswith(_MASK)}
    pairs = [Source(path, name, files[name + _MASK]) for name, path in images.items() if name + _MASK in files]
    paired = {source.name for source in pairs} | {source.name + _MASK for source in pairs}
    alone = [str(path) for name, path in files.items() if name not in paired]
    if not pairs:
        raise UserError(f"--indir {indir}: no pair NAME.png, NAME{_MASK}.png in it (alone: {_some(alone)})")
    if alone:
        _log.warning("skipped %d files without their image NAME or mask NAME%s: %s", len(alone), _MASK, _some(alone))
    return pairs


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
        raise UserError(f"none of {len(bad)} images can be read: {_some(bad)}")
    if bad:
        _log.warning("skipped %d unreadable images: %s", len(bad), _some(bad))


def read_prompts(file: str) -> list[str]:
    """Return the lines of a text file that are not empty. Raises UserError if there are none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from-file {file}: cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--from-file {file}: holds no prompt")
    return prompts


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
