"""Folders of images with captions: a text file next to each image, or one table (CSV, TSV, JSON lines) for all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.bounds import Count
from ldm.data.core.base import ImageDataset
from ldm.data.readers.columns import LABEL, complete_rows, draw_entry, number_labels
from ldm.data.readers.folders import existing_folder, find_files, find_images
from ldm.errors import UserError

__all__ = ["CaptionedFolder"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_NUM_PROBED = 16  # rows of a table, of which one file at least must exist
Row = Mapping[str, Any]


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
        self.class_names: list[str] = []
        self._fields: dict[str, list[Any]] = {}
        if captions is not None:
            names, fields = self._from_table(self._table_path(captions), dict(columns or {}))
            kept = self._index(names, str(captions))
            self._fields = {key: [values[i] for i in kept] for key, values in fields.items()}
        elif columns is None:
            self._index(self._captioned_images(), str(root))
        else:
            raise UserError(f"{root}: columns are those of a table; set captions to its file, or leave them out")

    def _captioned_images(self) -> list[str]:
        names, texts = find_images(self.root), set(find_files(self.root, [".txt"]))
        bare = [name for name in names if _text_file(name) not in texts]
        if bare and len(bare) == len(names):  # if only some are, they are skipped and counted when they are read
            raise UserError(
                f"{self.root}: none of the {len(names)} images has a caption, first {bare[0]}; "
                f"write {_text_file(bare[0])}, or set captions to a CSV or JSON lines file"
            )
        return names

    def _table_path(self, captions: str | Path) -> Path:
        candidates = [Path(captions).expanduser(), self.root / captions]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UserError(f"{captions}: no such file, neither here nor in {self.root}; set captions to a table")
        return found

    def _from_table(self, path: Path, columns: dict[str, str]) -> tuple[list[str], dict[str, list[Any]]]:
        """Return the names of the files, and the values of the other keys."""
        columns = {"file": "file", "caption": "caption", **columns}
        rows = _read_rows(path)
        _check_columns(rows, columns, path)
        table = {column: [row.get(column) for row in rows] for column in columns.values()}
        kept = complete_rows(table, str(path), first_row=1)
        fields = {key: [table[column][i] for i in kept] for key, column in columns.items()}
        names = list(map(str, fields.pop("file")))
        if names and not any((self.root / name).is_file() for name in names[:_NUM_PROBED]):
            raise UserError(f"{path}: {names[0]} is not below {self.root}; set root to the folder the paths start from")
        if LABEL in fields:
            fields[LABEL], self.class_names = number_labels(fields[LABEL])
        return names, fields

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        if not self._fields:
            return {"caption": (self.root / _text_file(self.names[file])).read_text(encoding="utf-8").strip()}
        return {key: draw_entry(key, values[file], rng) for key, values in self._fields.items()}


def _text_file(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").as_posix()


def _check_columns(rows: Sequence[Row], columns: Mapping[str, str], path: Path) -> None:
    for key, column in columns.items():
        if rows and all(row.get(column) is None for row in rows):
            raise UserError(
                f"{path}: no row has a column {column!r}, the first has {', '.join(map(str, rows[0]))}; "
                f"name yours in columns, e.g. columns.{key}=NAME"
            )


def _read_rows(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() in _DELIMITERS:
                return list(csv.DictReader(stream, delimiter=_DELIMITERS[path.suffix.lower()]))
            if path.suffix.lower() in _JSON_LINES:
                return list(_json_rows(stream, path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    raise UserError(f"{path}: captions must be a .csv, .tsv or .jsonl file")


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}: line {number} is no object; write {{"file": ..., "caption": ...}}')
        yield row
