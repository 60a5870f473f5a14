"""Zip files: their directory, read within bounds; and those that CompVis published, a checkpoint and its config."""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ldm.errors import UserError, shown

ZIP_MAGIC = b"PK\x03\x04"
DAMAGED = (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError)  # also encrypted, or of another time
_CHECKPOINTS, _CONFIG = (".ckpt", ".safetensors"), "config.yaml"
_LONGEST_DIRECTORY, _LONGEST_CONFIG = 1 << 23, 1 << 20  # bytes
_MOST_EXPANSION, _SPARE = 20, 1 << 26  # times, and bytes beside: weights hardly compress
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # a header of LZMA alone may ask for gigabytes


class _Bounded(io.FileIO):
    """A file of which only so much is read at once: zipfile reads a directory as a whole."""

    def read(self, size: int = -1) -> bytes:
        if size > _LONGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"it has a directory of {size:,} bytes")
        return super().read(size if size >= 0 else _LONGEST_DIRECTORY)


def directory(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """List the parts of a zip file. An error of DAMAGED if it has no directory, or one that no checkpoint needs."""
    if not zipfile.is_zipfile(file):
        raise zipfile.BadZipFile("its end is missing, copy it again")
    try:
        with zipfile.ZipFile(_Bounded(file.fileno(), closefd=False)) as archive:
            return archive.infolist()
    except OSError as error:  # a place before the beginning
        raise zipfile.BadZipFile(str(error)) from error


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield the checkpoint of an archive, as a temporary file; a file of any other kind as it is.

    UserError for an archive with several checkpoints, one that is damaged or grows as no weights do, or without room.
    """
    member = _find(path)
    if member is None:
        yield path
        return
    name = shown(member.filename)
    if member.file_size > _MOST_EXPANSION * member.compress_size + _SPARE:
        raise UserError(f"{path}: refused, {name} would grow to {member.file_size:,} bytes, as no weights do")
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if member.file_size > free:
            need = f"{name} has {member.file_size:,} bytes"
            raise UserError(f"{path}: {need}, and {tempfile.gettempdir()} has room for {free:,}; unpack it elsewhere")
        file = Path(folder) / f"model{Path(member.filename).suffix}"
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
        except DAMAGED as error:
            raise UserError(f"{path}: {name} cannot be unpacked ({shown(str(error))})") from error
        yield file


def config_in(path: Path) -> str | None:
    """Return the text of the config in an archive with a checkpoint; None if there is none."""
    if _find(path) is None:
        return None
    with zipfile.ZipFile(path) as archive:
        found = [info for info in archive.infolist() if Path(info.filename).name == _CONFIG]
        if not found:
            return None
        try:
            with archive.open(_readable(found[0], path)) as file:
                text = file.read(_LONGEST_CONFIG + 1)
            if len(text) > _LONGEST_CONFIG:
                raise ValueError(f"more than {_LONGEST_CONFIG:,} bytes")
            return text.decode("utf-8")
        except DAMAGED as error:
            raise UserError(f"{path}: {_CONFIG} cannot be read ({shown(str(error))})") from error


def _find(path: Path) -> zipfile.ZipInfo | None:
    """Return the checkpoint in a zip file; torch's own checkpoints are zip files without one."""
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return None
        try:
            found = [info for info in directory(file) if info.filename.endswith(_CHECKPOINTS)]
        except DAMAGED:
            return None  # whoever reads it says what is wrong
    if len(found) > 1:
        names = ", ".join(shown(info.filename) for info in found[:3])
        raise UserError(f"{path}: holds {names}{' and more' if found[3:] else ''}; unpack it and name one")
    return _readable(found[0], path) if found else None


def _readable(info: zipfile.ZipInfo, path: Path) -> zipfile.ZipInfo:
    """Return the part of a zip file. UserError if it is compressed as few programs do."""
    if info.compress_type not in _METHODS:
        raise UserError(f"{path}: {shown(info.filename)} is compressed by a rare method; unpack it")
    return info
