"""Tables of the Hugging Face hub and its library: encoded images in one column, captions and labels in others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bounds import Natural, Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.cache import SizedCache
from ldm.data.core.decoding import DecodedImage
from ldm.data.readers.columns import LABEL, Table
from ldm.data.readers.hub_tables import Group, HubTable, find_hub_tables, open_table

__all__ = ["Parquet"]

_IMAGE = "image"
_log = logging.getLogger(__name__)


class Parquet(ImageDataset):
    """Read rows of Parquet tables, or of a data set that `save_to_disk` wrote, in any order.

    Rows without a value under one of the keys are dropped and counted. Labels that are texts are numbered in
    alphabetical order; `class_names` lists them, or the names in the hub's metadata. To read one row of Parquet its
    whole row group is read: shuffled training is fast where the cache holds all groups, or where groups are small.
    Raises UserError for absent files and columns, and without the package pyarrow.

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
        size: Sides,
        columns: Mapping[str, str] | None = None,
        cache_mb: Natural = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        given = [paths] if isinstance(paths, (str, Path)) else paths
        self._tables = [table for path in given for table in find_hub_tables(str(path))]
        self._groups: SizedCache[tuple[int, int], Group] = SizedCache(cache_mb * 2**20, attrgetter("nbytes"))
        self._warned = False
        fields = {"caption": "caption"} if columns is None else dict(columns)
        self._image_column = fields.pop(_IMAGE, None) or _IMAGE
        self._fields = Table(fields)
        rows = self._read_all_rows()
        kept = self._index([f"{self._tables[table].name}: row {row}" for (table, _, _), row in rows], str(paths))
        self._rows = np.array([rows[i][0] for i in kept], dtype=np.int64)  # (files, 3): table, row group, row in it
        self._fields.select(kept)
        self.class_names = self._fields.class_names

    def _read_all_rows(self) -> list[tuple[tuple[int, int, int], int]]:
        """Read all columns but the images'; return (table, group, row in it) and the row of each one that is kept."""
        rows = []
        for number, path in enumerate(self._tables):
            table = open_table(path)
            Table({_IMAGE: self._image_column}).choose_columns(table.names, str(path))
            self._fields.choose_columns(table.names, str(path))
            places = _places(table, number)
            values = {column: table.values(column) for column in self._fields.columns.values()}
            files = table.paths(self._image_column) or [None] * len(places)
            kept = self._fields.add(values, files, str(path), "row {}".format)
            rows += [(places[row], row) for row in kept]
        self._fields.number_labels(lambda: _hub_names(open_table(self._tables[0]), self._fields.columns[LABEL]))
        return rows

    def _read_image(self, file: int) -> DecodedImage:
        number, group, row = self._rows[file].tolist()
        value = self._groups.get((number, group), self._read_group).values[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return self.transform.open(self._tables[number].parent / value["path"])
        if not isinstance(content, bytes):
            raise ValueError(f"holds {type(content).__name__} in place of the bytes of an image")
        return self.transform.open(content)

    def _read_group(self, key: tuple[int, int]) -> Group:
        """Return the images' column of a row group of a table."""
        number, group = key
        read = open_table(self._tables[number]).group(self._image_column, group)
        if self._groups.size and self._groups.size + read.nbytes > self._groups.capacity and not self._warned:
            self._warned = True
            _log.warning(
                "the row groups of %s (this one %d MB) do not all fit into %d MB: in random order they are read "
                "again and again; raise cache_mb, or write the table anew with a small row_group_size",
                self._tables[number].name, read.nbytes // 2**20, self._groups.capacity // 2**20,
            )  # fmt: skip
        return read

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return self._fields.read(file, rng)


def _places(table: HubTable, number: int) -> list[tuple[int, int, int]]:
    """Return (table, group, row in it) of each row."""
    return [(number, group, row) for group, size in enumerate(table.sizes) for row in range(size)]


def _hub_names(table: HubTable, column: str) -> list[str]:
    """Return the class names in the schema's metadata, where the Hugging Face datasets library writes them."""
    try:
        noted = json.loads(table.metadata.get(b"huggingface", b"{}"))
        return list(noted["info"]["features"][column]["names"])
    except (ValueError, KeyError, TypeError):
        return []
