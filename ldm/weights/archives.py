"""Zip files as CompVis published them: one checkpoint, and perhaps its config."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError

_CHECKPOINTS, _CONFIG = (".ckpt", ".safetensors"), "config.yaml"


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield the checkpoint of an archive, as a temporary file; a file of any other kind as it is.

    UserError for an archive with several checkpoints, without room for its checkpoint, or damaged.
    """
    member = _find(path)
    if member is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if member.file_size > free:
            need = f"{member.filename} has {member.file_size:,} bytes"
            raise UserError(f"{path}: {need}, and {tempfile.gettempdir()} has room for {free:,}; unpack it elsewhere")
        file = Path(folder) / Path(member.filename).name
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # of another compression, encrypted
            raise UserError(f"{path}: {member.filename} cannot be unpacked ({error})") from error
        yield file


def config_in(path: Path) -> str | None:
    """Return the text of the config in an archive with a checkpoint; None if there is none."""
    if _find(path) is None:
        return None
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if Path(name).name == _CONFIG]
        return archive.read(names[0]).decode("utf-8") if names else None


def _find(path: Path) -> zipfile.ZipInfo | None:
    """Return the checkpoint in a zip file; torch's own checkpoints are zip files without one."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(_CHECKPOINTS)]
    if len(found) > 1:
        raise UserError(f"{path}: holds {', '.join(info.filename for info in found)}; unpack it and name one")
    return found[0] if found else None
