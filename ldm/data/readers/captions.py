"""Folders of pictures with captions: a text file beside each picture, or one table (CSV, TSV, JSON lines) for all."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.bounds import Count
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import Picture
from ldm.data.readers.folders import existing_folder, find_files, find_pictures
from ldm.errors import UserError

__all__ = ["LABEL", "CaptionedFolder", "number_labels", "one_of"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
LABEL, _CAPTION = "class_label", "caption"
_log = logging.getLogger(__name__)
_PROBED = 16  # rows whose files must not all be absent
Row = Mapping[str, Any]


class CaptionedFolder(ImageDataset):
    """Read pictures below `root` with `caption` and, if there is a column for it, `class_label`.

    captions: None for `name.txt` beside `name.jpg`; else a CSV, TSV or JSON lines file, given as such or relative to
    `root`. columns: which column of it holds `file` (path below `root`), `caption`, and any further key of the batch,
    e.g. {file: image, caption: text, class_label: species}. Of a list of captions (JSON lines) one is drawn per epoch.
    Labels that are not whole numbers are numbered in alphabetical order, `class_names` lists them. For the other
    options see `ImageDataset`. Rows that lack one of the columns are counted, named and left out. Raises UserError for
    missing folders, tables, columns and captions.
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
        self._rows: list[Row] = []
        if captions is not None:
            names, rows = self._from_table(self._table_path(captions), dict(columns or {}))
            self._rows = [rows[i] for i in self._index(names, str(captions))]
        elif columns is None:
            self._index(self._captioned_pictures(), str(root))
        else:
            raise UserError(f"{root}: columns are those of a table; set captions to its file, or leave them out")

    def _captioned_pictures(self) -> list[str]:
        names, texts = find_pictures(self.root), set(find_files(self.root, [".txt"]))
        bare = [name for name in names if _text_beside(name) not in texts]
        if bare and len(bare) == len(names):  # single ones are skipped and counted when they are read
            raise UserError(
                f"{self.root}: none of the {len(names)} pictures has a caption, first {bare[0]}; "
                f"write {_text_beside(bare[0])}, or set captions to a CSV or JSON lines file"
            )
        return names

    def _table_path(self, captions: str | Path) -> Path:
        candidates = [Path(captions).expanduser(), self.root / captions]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UserError(f"{captions}: no such file, neither here nor in {self.root}; set captions to a table")
        return found

    def _from_table(self, path: Path, columns: dict[str, str]) -> tuple[list[str], list[Row]]:
        columns = {"file": "file", "caption": "caption", **columns}
        rows = _complete_rows(_read_rows(path), columns, path)
        names = [str(row[columns["file"]]) for row in rows]
        if names and not any((self.root / name).is_file() for name in names[:_PROBED]):
            raise UserError(f"{path}: {names[0]} is not below {self.root}; set root to the folder the paths start from")
        fields = {key: column for key, column in columns.items() if key != "file"}
        return names, self._with_labels([{key: row[column] for key, column in fields.items()} for row in rows])

    def _with_labels(self, rows: list[Row]) -> list[Row]:
        """Turn the class labels into numbers."""
        if not rows or LABEL not in rows[0]:
            return rows
        labels, self.class_names = number_labels([row[LABEL] for row in rows])
        return [{**row, LABEL: label} for row, label in zip(rows, labels, strict=True)]

    def _read_image(self, file: int) -> Picture:
        return self.transform.open(self.root / self.names[file])

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        if not self._rows:
            return {"caption": (self.root / _text_beside(self.names[file])).read_text(encoding="utf-8").strip()}
        return {key: one_of(key, value, rng) for key, value in self._rows[file].items()}


def _text_beside(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").as_posix()


def number_labels(labels: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Turn labels into numbers: whole numbers as they are, others by rank; return them with the names in order."""
    texts = [str(label).strip() for label in labels]
    if all(text.removeprefix("-").isdigit() for text in texts):
        return [int(text) for text in texts], []
    names = sorted(set(texts))
    rank = {name: i for i, name in enumerate(names)}
    return [rank[text] for text in texts], names


def one_of(key: str, value: Any, rng: np.random.Generator) -> Any:
    """Return a value, of a list one of its entries; captions as texts, an empty one where a list has none."""
    if isinstance(value, list) and value:
        value = value[int(rng.integers(len(value)))]
    if key != _CAPTION:
        return value
    return "" if value is None or isinstance(value, list) else str(value).strip()


def _complete_rows(rows: list[Row], columns: Mapping[str, str], path: Path) -> list[Row]:
    """Leave out rows that lack something, with a warning. Raises UserError for a column that no row has."""
    for key, column in columns.items():
        if rows and all(row.get(column) is None for row in rows):
            raise UserError(
                f"{path}: no row has a column {column!r}, the first has {', '.join(map(str, rows[0]))}; "
                f"name yours in columns, e.g. columns.{key}=NAME"
            )
    lacking = [i for i, row in enumerate(rows) if any(row.get(column) is None for column in columns.values())]
    if lacking:
        what = ", ".join(columns.values())
        _log.warning(
            "%s: %d of %d rows have nothing under one of %s and are left out, the first is row %d",
            path, len(lacking), len(rows), what, lacking[0] + 1,
        )  # fmt: skip
    left_out = set(lacking)
    return [row for i, row in enumerate(rows) if i not in left_out]


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
