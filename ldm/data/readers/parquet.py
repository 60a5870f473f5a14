"""Parquet tables as on the Hugging Face hub: encoded images in one column, captions and labels in others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bounds import Count, Natural
from ldm.data.core.base import ImageDataset
from ldm.data.core.cache import SizedCache
from ldm.data.core.decoding import DecodedImage
from ldm.data.core.files import find_tables
from ldm.data.core.optional import require
from ldm.data.readers.columns import LABEL, Table
from ldm.errors import UserError

__all__ = ["Parquet"]

_COLUMNS = {"image": "image", "caption": "caption"}
_REMEDY = "set paths to Parquet tables, a folder of them, or a pattern"
_log = logging.getLogger(__name__)


class Parquet(ImageDataset):
    """Read rows of Parquet tables in any order.

    Rows without a value under one of the keys are dropped and counted. Labels that are texts are numbered in
    alphabetical order; `class_names` lists them, or the names in the hub's metadata. To read one row its whole row
    group is read: shuffled training is fast where the cache holds all groups, or where groups are small. Raises
    UserError for absent files and columns, and without the package pyarrow.

    Args:
        paths: tables, folders of them, globs, or a list of these.
        columns: the column of `image` (bytes, or a struct {bytes, path}), and of each other key of the batch; by
            default {image: image, caption: caption}. If a caption is a list, each epoch draws one of its entries.
        cache_mb: megabytes of row groups to keep in each worker.
        kwargs: the options of `ImageDataset`.
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
        given = [paths] if isinstance(paths, (str, Path)) else paths
        self._tables = [
            Path(t) for path in given for t in find_tables(str(path), ".parquet", "table", _REMEDY, deep=True)
        ]
        self._groups: SizedCache[tuple[int, int], Any] = SizedCache(cache_mb * 2**20, attrgetter("nbytes"))
        self._warned = False
        self._fields = Table({key: column for key, column in self.columns.items() if key != "image"})
        rows = self._read_all_rows()
        kept = self._index([f"{self._tables[table].name}: row {row}" for (table, _, _), row in rows], str(paths))
        self._rows = np.array([rows[i][0] for i in kept], dtype=np.int64)  # (files, 3): table, row group, row in it
        self._fields.select(kept)
        self.class_names = self._fields.class_names

    def _read_all_rows(self) -> list[tuple[tuple[int, int, int], int]]:
        """Read all columns but the images'; return (table, group, row in it) and the row of each one that is kept."""
        rows = []
        for number, path in enumerate(self._tables):
            table = self._open(number)
            Table(self.columns).check_columns(table.schema_arrow.names, str(path))
            places = _places(table, number)
            wanted = list(self._fields.columns.values())
            values = {column: table.read(columns=[column]).column(0).to_pylist() for column in wanted}
            files = self._files_of(table) or [None] * len(places)
            kept = self._fields.add(values, files, str(path), "row {}".format)
            rows += [(places[row], row) for row in kept]
        self._fields.number_labels(lambda: _hub_names(self._open(0).schema_arrow, self.columns[LABEL]))
        return rows

    def _files_of(self, table: Any) -> list[str | None]:
        """Return the paths beside the images, [] if there are none."""
        column = self.columns["image"]
        leaves = [table.schema.column(i).path for i in range(len(table.schema))]
        if f"{column}.path" not in leaves:
            return []
        values = table.read(columns=[f"{column}.path"]).column(0).to_pylist()
        return [value and value.get("path") for value in values]

    def _open(self, number: int) -> Any:
        path = self._tables[number]
        parquet = require("pyarrow.parquet", f"{path}: a Parquet table", "pyarrow")
        try:
            return parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # of which ArrowInvalid is one
            raise UserError(f"{path}: not a readable Parquet table ({' '.join(str(error).split())})") from error

    def _read_image(self, file: int) -> DecodedImage:
        number, group, row = self._rows[file].tolist()
        value = self._groups.get((number, group), self._read_group)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return self.transform.open(self._tables[number].parent / value["path"])
        if not isinstance(content, bytes):
            raise ValueError(f"holds {type(content).__name__} in place of the bytes of an image")
        return self.transform.open(content)

    def _read_group(self, key: tuple[int, int]) -> Any:
        """Return the images' column of a row group of a table."""
        number, group = key
        column = self._open(number).read_row_group(group, columns=[self.columns["image"]]).column(0)
        if self._groups.size and self._groups.size + column.nbytes > self._groups.capacity and not self._warned:
            self._warned = True
            _log.warning(
                "the row groups of %s (this one %d MB) do not all fit into %d MB: in random order they are read "
                "again and again; raise cache_mb, or write the table anew with a small row_group_size",
                self._tables[number].name, column.nbytes // 2**20, self._groups.capacity // 2**20,
            )  # fmt: skip
        return column

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return self._fields.read(file, rng)


def _places(table: Any, number: int) -> list[tuple[int, int, int]]:
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    return [(number, group, row) for group, size in enumerate(sizes) for row in range(size)]


def _hub_names(schema: Any, column: str) -> list[str]:
    """Return the class names in the schema's metadata, where the Hugging Face datasets library writes them."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return list(noted["info"]["features"][column]["names"])
    except (ValueError, KeyError, TypeError):
        return []
