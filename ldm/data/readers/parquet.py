"""Parquet tables as the Hugging Face hub holds them: encoded pictures in one column, captions and labels in others."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.bounds import Count, Natural
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import Picture
from ldm.data.readers.captions import LABEL, number_labels, one_of
from ldm.errors import UserError

__all__ = ["Parquet"]

_COLUMNS = {"image": "image", "caption": "caption"}
_log = logging.getLogger(__name__)


class _Place(NamedTuple):
    table: int
    group: int
    row: int


class Parquet(ImageDataset):
    """Read rows of Parquet tables in any order.

    paths: tables, folders of them, globs, or a list of these. columns: which column holds `image` (bytes, or a struct
    {bytes, path}), and each further key of the batch, by default {image: image, caption: caption}. Of a list of
    captions one is drawn per epoch. Rows without a value under one of the keys are counted, named and left out. Labels
    that are texts are numbered in alphabetical order; `class_names` lists them, or what the hub's metadata says.

    A row is read with its whole row group, the last of which are kept, `cache_mb` megabytes of them in each worker:
    shuffled training is fast where all groups fit, or groups are small. For the other options see `ImageDataset`.
    Raises UserError for absent files and columns, and without the package pyarrow.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        size: Count | Sequence[Count],
        columns: Mapping[str, str] | None = None,
        cache_mb: Natural = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.columns = dict(_COLUMNS if columns is None else {"image": "image", **columns})
        self.cache_mb = cache_mb
        self.class_names: list[str] = []
        self._tables = _tables(paths)
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._warned = False
        places, fields = self._read_all_fields()
        names = [f"{self._tables[place.table].name}: row {row}" for place, row in places]
        kept = self._index(names, str(paths))
        self._places = np.array([places[i][0] for i in kept], dtype=np.int64)  # (files, 3)
        self._fields = {key: [values[i] for i in kept] for key, values in fields.items()}

    def _read_all_fields(self) -> tuple[list[tuple[_Place, int]], dict[str, list[Any]]]:
        """Read all columns but the pictures'; return (place, row in its table) of each complete row, and the values."""
        places: list[tuple[_Place, int]] = []
        fields: dict[str, list[Any]] = {key: [] for key in self.columns if key != "image"}
        num_left_out, first = 0, ""
        for number, path in enumerate(self._tables):
            table = self._open(number)
            self._check_columns(table, path)
            values = table.read(columns=[self.columns[key] for key in fields]) if fields else None
            columns = {key: values.column(self.columns[key]).to_pylist() for key in fields}
            for row, place in enumerate(_places(table, number)):
                if any(column[row] is None for column in columns.values()):
                    num_left_out, first = num_left_out + 1, first or f"{path.name}: row {row}"
                    continue
                places.append((place, row))
                for key, column in columns.items():
                    fields[key].append(column[row])
        if num_left_out:
            what = ", ".join(self.columns[key] for key in fields)
            _log.warning("%d rows have nothing under one of %s and are left out, first %s", num_left_out, what, first)
        if LABEL in fields:
            fields[LABEL], self.class_names = number_labels(fields[LABEL])
            self.class_names = self.class_names or _hub_names(self._open(0).schema_arrow, self.columns[LABEL])
        return places, fields

    def _open(self, number: int) -> Any:
        path = self._tables[number]
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{path}: a Parquet table needs the package pyarrow (extra `data`): pip install pyarrow"
            ) from error
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{path}: not a readable Parquet table ({' '.join(str(error).split())})") from error

    def _check_columns(self, table: Any, path: Path) -> None:
        known = table.schema_arrow.names
        for key, column in self.columns.items():
            if column not in known:
                raise UserError(
                    f"{path}: no column {column!r} for {key!r}, it has {', '.join(known)}; set columns.{key}=NAME"
                )

    def _read_image(self, file: int) -> Picture:
        number, group, row = self._places[file].tolist()
        value = self._group(number, group)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return self.transform.open(self._tables[number].parent / value["path"])
        if not isinstance(content, bytes):
            raise ValueError(f"holds {type(content).__name__} in place of the bytes of a picture")
        return self.transform.open(content)

    def _group(self, number: int, group: int) -> Any:
        """Return the pictures' column of a row group, from those that are kept if it is among them."""
        if (number, group) in self._groups:
            self._groups.move_to_end((number, group))
            return self._groups[number, group]
        column = self._open(number).read_row_group(group, columns=[self.columns["image"]]).column(0)
        self._groups[number, group] = column
        total = sum(kept.nbytes for kept in self._groups.values())
        while total > self.cache_mb * 2**20 and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            total -= oldest.nbytes
            if not self._warned:
                self._warned = True
                _log.warning(
                    "the row groups of %s (this one %d MB) do not all fit into %d MB: in random order they are read "
                    "again and again; raise cache_mb, or write the table anew with a small row_group_size",
                    self._tables[number].name, column.nbytes // 2**20, self.cache_mb,
                )  # fmt: skip
        return column

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return {key: one_of(key, values[file], rng) for key, values in self._fields.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict()}


def _tables(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for given in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(given).expanduser()
        if path.is_file():
            found.append(path)
            continue
        matches = sorted(glob(str(path))) if has_magic(str(path)) else sorted(map(str, path.rglob("*.parquet")))
        if not matches:
            what = "a folder without *.parquet files" if path.is_dir() else "no such table"
            raise UserError(f"{given}: {what}; set paths to Parquet tables, a folder of them, or a pattern")
        found += map(Path, matches)
    return found


def _places(table: Any, number: int) -> list[_Place]:
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    return [_Place(number, group, row) for group, size in enumerate(sizes) for row in range(size)]


def _hub_names(schema: Any, column: str) -> list[str]:
    """Return the names of classes that the Hugging Face datasets library notes in the schema, if it does."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return list(noted["info"]["features"][column]["names"])
    except (ValueError, KeyError, TypeError):
        return []
