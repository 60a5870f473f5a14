"""Outputs of frozen encoders on the disk: files of whole rows, read by memory map, so that nothing is encoded twice.

    FOLDER/cache.json                   what the cache was made of, and the statistics of its latents
    FOLDER/latents-00000.safetensors    `rows` items: moments, the other tensors of the items, their texts as JSON
    FOLDER/null.safetensors             what a dropped condition is encoded to

View v of item i is row v * N + i of all files together. Every row has a checksum, which is compared when a process
first reads it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm.bounds import Count
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError, shown
from ldm.writing import give_usual_rights, replacing

__all__ = ["CacheSettings", "CachedLatents", "LatentFiles", "read_null"]

_PATH = "lightning.cache_latents"
_TEXTS, _ENDS = "texts", "text_ends"  # all texts of a file in one tensor of bytes, and where those of each item end
_CHECKSUMS = "checksums"  # CRC-32 of each row
_ABOUT = "cache"  # one text beside the tensors; safetensors writes several in random order
_FIELD = "field."  # begins the names of tensors that are keys of an item


@dataclass(frozen=True)
class CacheSettings:
    """How a training set is cached.

    Args:
        views: crops and flips of each image that are kept; epoch e reads view e modulo their number.
        half: whether moments are kept in half precision, which rounds them.
        folder: where (default: one named by what it was made of, in `outputs/latents` beside the folder of runs).
        rows: items a file; an encoding that was stopped goes on after its last whole file.
    """

    views: Count = 1
    half: bool = False
    folder: str | None = None
    rows: Count = 1024


@dataclass(frozen=True)
class LatentFiles:
    """The files of a cache of `items` items in `views` views each, `rows` of them a file; `key` says of what.

    Raises UserError, by the name of the file, for one that is damaged or of another cache.
    """

    folder: Path
    key: str
    items: Count
    views: Count = 1
    rows: Count = 1024

    def __len__(self) -> int:
        return -(-self.items * self.views // self.rows)

    @property
    def index(self) -> Path:
        """Return the file that describes the cache."""
        return self.folder / "cache.json"

    @property
    def null(self) -> Path:
        """Return the file of what dropped conditions are encoded to."""
        return self.folder / "null.safetensors"

    def path(self, number: int) -> Path:
        """Return the path of a file."""
        return self.folder / f"latents-{number:05}.safetensors"

    def rows_of(self, number: int) -> range:
        """Return the rows that a file holds."""
        return range(number * self.rows, min((number + 1) * self.rows, self.items * self.views))

    def sample(self, row: int, seed: int) -> SampleKey:
        """Return which item is encoded to a row: that of epoch v for view v."""
        return SampleKey(row % self.items, row // self.items, seed)

    def row(self, key: SampleKey) -> int:
        """Return the row of an item: in epoch e its view e modulo the number of views."""
        return key.epoch % self.views * self.items + key.index

    def missing(self) -> list[int]:
        """Check all files that there are, and list those that are not there yet."""
        absent = []
        for number in range(len(self)):
            if self.path(number).exists():
                self.note(self.path(number), len(self.rows_of(number)))
            else:
                absent.append(number)
        return absent

    def note(self, path: Path, rows: int | None = None) -> Any:
        """Check a file of so many rows without reading them, and return the note that was written with it."""
        remedy = "delete it, and it is made anew"
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
                about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            what = f"is truncated or no file of a cache ({shown(str(error), 60)})"
            raise UserError(f"{path}: {what}; {remedy}") from error
        counts = [shape[0] for name, shape in shapes.items() if name.startswith(_FIELD) or name == _CHECKSUMS]
        wrong = rows is not None and (set(counts) != {rows} or not {_CHECKSUMS, _TEXTS, _ENDS} <= set(shapes))
        if about.get("key") != self.key or wrong:
            raise UserError(f"{path}: is of another cache, of other data or another encoder; {remedy}")
        return about["note"]

    def write(self, number: int, batches: Iterable[Mapping[str, Any]], note: Any = None) -> None:
        """Write the rows of a file, whole or not at all; tensors and lists of a batch are columns."""
        tensors: dict[str, list[Tensor]] = {}
        lines: list[bytes] = []
        for batch in batches:
            columns = {}
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.dim() > 1:
                    tensors.setdefault(_FIELD + name, []).append(value.detach().cpu())
                else:  # texts, and numbers
                    columns[name] = value.tolist() if isinstance(value, Tensor) else value
            lines += [_line(columns, row) for row in range(len(next(iter(batch.values()))))]
        whole = {name: torch.cat(parts).contiguous() for name, parts in tensors.items()}
        whole[_CHECKSUMS] = torch.tensor([_checksum(whole, row, line) for row, line in enumerate(lines)])
        whole[_TEXTS] = torch.frombuffer(bytearray(b"".join(lines)), dtype=torch.uint8)
        whole[_ENDS] = torch.from_numpy(np.cumsum([0, *map(len, lines)]))  # (rows + 1,), from 0
        self.save(self.path(number), whole, note)

    def save(self, path: Path, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Write tensors and a note as one file of this cache, whole or not at all. UserError if that fails."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {"key": self.key, "note": note, _CHECKSUMS: _checksums(tensors)}
            with replacing(path) as beside:
                save_file(dict(tensors), beside, {_ABOUT: json.dumps(about)})
                give_usual_rights(beside)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({shown(str(error), 100)}); make room, or set "
                            f"{_PATH}.folder") from error  # fmt: skip


class CachedLatents(Dataset):
    """Data set with the items {"moments": outputs of the encoder (C, h, w), **the other keys of the item}.

    The moments are those before the regulariser, so that a KL posterior is still sampled every time. Files are mapped
    into memory when a row of theirs is first read; the processes of a machine share what they read.
    """

    def __init__(self, files: LatentFiles) -> None:
        self.files = files
        self._open: dict[int, dict[str, Tensor]] = {}
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return self.files.items

    def __getitem__(self, index: int | SampleKey) -> dict[str, Any]:
        key = index if isinstance(index, SampleKey) else SampleKey(int(index))
        if not 0 <= key.index < len(self):
            raise IndexError(key.index)
        place = self.files.row(key)
        number, row = divmod(place, self.files.rows)
        tensors = self._open.get(number)
        if tensors is None:
            tensors = self._open[number] = _mapped(self.files.path(number))
        begin, end = tensors[_ENDS][row : row + 2].tolist()
        if not 0 <= begin <= end <= len(tensors[_TEXTS]):
            raise _damaged(self.files.path(number))
        line = tensors[_TEXTS][begin:end].numpy().tobytes()
        if place not in self._checked:
            if _checksum(tensors, row, line) != int(tensors[_CHECKSUMS][row]):
                raise _damaged(self.files.path(number))
            self._checked.add(place)
        fields = {name.removeprefix(_FIELD): value[row] for name, value in tensors.items() if name.startswith(_FIELD)}
        return {**fields, **json.loads(line)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_checked": set()}


def _checksum(tensors: Mapping[str, Tensor], row: int, line: bytes) -> int:
    """Return the CRC-32 of the tensors and the text of a row."""
    found = zlib.crc32(line)
    for name in sorted(name for name in tensors if name.startswith(_FIELD)):
        found = zlib.crc32(_bytes(tensors[name][row]), found)
    return found


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the CRC-32 of each tensor as a whole."""
    return {name: zlib.crc32(_bytes(tensor)) for name, tensor in sorted(tensors.items())}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _damaged(path: Path, why: str = "") -> UserError:
    return UserError(f"{path}: is damaged{why}; delete it and start the run again, which makes it anew")


def _line(columns: Mapping[str, Any], row: int) -> bytes:
    """Write what an item holds beside its tensors. UserError for what JSON cannot say."""
    try:
        return json.dumps({name: column[row] for name, column in columns.items()}).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"{_PATH}: items hold what cannot be kept ({error}); leave it out") from error


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f" ({shown(str(error), 60)})") from error


def read_null(files: LatentFiles) -> dict[str, Tensor]:
    """Return what dropped conditions are encoded to, by the key of the conditioner."""
    if not files.null.exists():
        return {}
    tensors = _mapped(files.null)
    with safe_open(files.null, "pt") as file:
        about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
    if about.get(_CHECKSUMS) != _checksums(tensors):
        raise _damaged(files.null)
    return tensors
