"""Folders of images with captions: a text file next to each image, or one table (CSV, TSV, JSON lines) for all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.bounds import Count
from ldm.data.core.base import ImageDataset
from ldm.data.core.files import existing_folder, find_files, find_images, read_text, regular_file
from ldm.data.readers.columns import Table
from ldm.errors import UserError

__all__ = ["CaptionedFolder"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_NUM_PROBED = 16  # rows of a table, of which one file at least must exist
Row = tuple[int, Mapping[str, Any]]  # its line, and the values by column


class CaptionedFolder(ImageDataset):
    """Read the images below `root` with `caption` and, if a column is given for it, `class_label`.

    Labels that are not whole numbers are numbered in alphabetical order; `class_names` lists them. Rows without a
    value in one of the columns are dropped and counted. Raises UserError for missing folders, tables, columns and
    captions.

    Args:
        captions: None for `name.txt` next to `name.jpg`; otherwise a CSV, TSV or JSON lines file, also relative to
            `root`.
        columns: the column of the table for `file` (path below `root`), `caption`, and any other key of the batch,
            e.g. {file: image, caption: text, class_label: species}. If a caption of a JSON lines file is a list, each
            epoch draws one of its entries.
        kwargs: the options of `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Count | Sequence[Count],
        captions: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.root = existing_folder(root)
        self._table: Table | None = None
        self._texts: dict[str, str] = {}  # of images without a table, by their path without its ending
        if captions is not None:
            self._table = Table({"file": "file", "caption": "caption", **(columns or {})})
            names = self._rows_of(self._table, self._table_path(captions))
            self._table.select(self._index(names, str(captions)))
            self.class_names = self._table.class_names
        elif columns is None:
            self._index(self._captioned_images(), str(root))
        else:
            raise UserError(f"{root}: columns are those of a table; set captions to its file, or leave them out")

    def _captioned_images(self) -> list[str]:
        names = find_images(self.root)
        self._texts = {_stem(name): name for name in find_files(self.root, [".txt"])}
        bare = [name for name in names if _stem(name) not in self._texts]
        if bare and len(bare) == len(names):  # if only some are, they are skipped and counted when they are read
            raise UserError(
                f"{self.root}: none of the {len(names)} images has a caption, first {bare[0]}; "
                f"write {_stem(bare[0])}.txt, or set captions to a CSV or JSON lines file"
            )
        return names

    def _table_path(self, captions: str | Path) -> Path:
        candidates = [Path(captions).expanduser(), self.root / captions]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UserError(f"{captions}: no such file, neither here nor in {self.root}; set captions to a table")
        return found

    def _rows_of(self, table: Table, path: Path) -> list[str]:
        """Read a file into the table; return the names of the images."""
        rows = _read_rows(path, table.columns.values())
        if rows:
            known = dict.fromkeys(name for _, row in rows for name, value in row.items() if value is not None)
            table.check_columns(known, str(path))
        values = {column: [row.get(column) for _, row in rows] for column in table.columns.values()}
        files = [None if file is None else str(file) for file in values[table.columns["file"]]]
        table.add(values, files, str(path), lambda i: f"line {rows[i][0]}")
        table.number_labels()
        names = list(map(str, table.pop("file")))
        if names and not any((self.root / name).is_file() for name in names[:_NUM_PROBED]):
            raise UserError(f"{path}: {names[0]} is not below {self.root}; set root to the folder the paths start from")
        return names

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        if self._table is not None:
            return self._table.read(file, rng)
        stem = _stem(self.names[file])
        return {"caption": read_text(regular_file(self.root / self._texts.get(stem, f"{stem}.txt"))).strip()}


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _read_rows(path: Path, columns: Collection[str]) -> list[Row]:
    """Read the rows of a table. Raises UserError, with the line, for what is no row."""
    ending = path.suffix.lower()
    try:
        if ending in _DELIMITERS:
            return list(_csv_rows(read_text(path), _DELIMITERS[ending], columns, path))
        if ending in _JSON_LINES:
            return list(_json_rows(read_text(path), path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    raise UserError(f"{path}: captions must be a .csv, .tsv or .jsonl file")


def _csv_rows(text: str, delimiter: str, columns: Collection[str], path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    remedy = f'put texts with {delimiter!r} or " into double quotes, and double the " in them'
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := [name for name in columns if header.count(name) > 1]:
            raise UserError(f"{path}: line 1: {header.count(twice[0])} columns are named {twice[0]!r}; rename them")
        line = reader.line_num + 1
        for values in reader:
            if any(value.strip() for value in values[len(header) :]):
                raise UserError(f"{path}: line {line} has {len(values)} fields, the header {len(header)}; {remedy}")
            if values:
                yield line, dict(zip(header, values, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {line}: {error}; {remedy}") from error


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_distinct)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}: line {number} is no object; write {{"file": ..., "caption": ...}}')
        yield number, row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("it has a key twice")
    return dict(pairs)
