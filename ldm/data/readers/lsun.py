"""LSUN (Yu et al. 2015): one LMDB a category and split, or the images exported from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.bounds import Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import DecodedImage
from ldm.data.core.files import existing_folder, find_images
from ldm.data.core.optional import require
from ldm.data.readers.folders import read_list
from ldm.errors import UserError

__all__ = ["LSUN"]

_DATA = "data.mdb"
_OPENED: dict[tuple[int, Path], Any] = {}  # process and folder -> lmdb.Environment
_log = logging.getLogger(__name__)


class LSUN(ImageDataset):
    """Read the images of one category, e.g. root=church_outdoor_train_lmdb.

    root: the folder of an LMDB as published, whose values are encoded images; or a folder of exported images, flat or
    nested by the first letters of the key. list_file: a text file of names, one a line. Only the last part of each
    counts, without its extension, so that the published lists fit every layout; absent ones are counted and left out.
    For the other options see `ImageDataset`. Raises UserError for missing or empty folders.
    """

    def __init__(self, root: str | Path, size: Sides, list_file: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(size, **kwargs)
        self.root = existing_folder(root)
        self._is_lmdb = (self.root / _DATA).is_file()
        names = self._keys() if self._is_lmdb else find_images(self.root)
        self._index(names if list_file is None else _listed(names, Path(list_file).expanduser()), str(root))

    def _keys(self) -> list[str]:
        with _environment(self.root).begin() as transaction, transaction.cursor() as cursor:
            return [key.decode("ascii", "surrogateescape") for key in cursor.iternext(keys=True, values=False)]

    def _read_image(self, file: int) -> DecodedImage:
        if not self._is_lmdb:
            return super()._read_image(file)
        with _environment(self.root).begin() as transaction:
            content = transaction.get(self.names[file].encode("ascii", "surrogateescape"))
        if content is None:
            raise OSError("the LMDB has no such key")
        return self.transform.open(content)


def _environment(root: Path) -> Any:
    """Open an LMDB once in each process: it must not be opened twice, nor be used in a fork of the process."""
    key = os.getpid(), root.resolve()
    if key not in _OPENED:
        lmdb = require("lmdb", f"{root}: an LMDB")
        for inherited in [other for other in _OPENED if other[0] != key[0]]:
            _OPENED.pop(inherited).close()  # from the parent of a fork; lmdb would take it for open
        try:
            # Without locks: the files may be read-only, and nothing writes to them.
            opened = lmdb.open(str(root), readonly=True, lock=False, readahead=False, create=False)
            size, needed = (root / _DATA).stat().st_size, (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
            if size < needed:  # to read beyond the end of mapped memory ends the process without a word
                opened.close()
                raise UserError(f"{root / _DATA}: is cut off, {size:,} of {needed:,} bytes; copy it again")
            _OPENED[key] = opened
        except lmdb.Error as error:
            raise UserError(f"{root}: not a readable LMDB ({error})") from error
    return _OPENED[key]


def _listed(names: Sequence[str], path: Path) -> list[str]:
    """Return the names that a list contains, in its order."""
    by_key = {PurePosixPath(name).stem: name for name in names}
    wanted = read_list(path)
    found = [by_key[PurePosixPath(name).stem] for name in wanted if PurePosixPath(name).stem in by_key]
    if len(found) < len(wanted):
        absent = next(name for name in wanted if PurePosixPath(name).stem not in by_key)
        if not found:
            raise UserError(f"{path}: none of its {len(wanted)} images is among the {len(names)} there, as {absent}")
        _log.warning("%s: %d of %d images are not there, first %s", path, len(wanted) - len(found), len(wanted), absent)
    return found
