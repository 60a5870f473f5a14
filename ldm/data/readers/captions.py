"""Folders of images with captions: a text file next to each image, or tables (CSV, TSV, JSON lines) of them."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm.bounds import Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.files import (
    check_one_split,
    existing_folder,
    find_files,
    find_images,
    parse_json,
    read_text,
    regular_file,
    written_path,
)
from ldm.data.readers.columns import Table
from ldm.errors import UserError

__all__ = ["CaptionedFolder"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SAYS = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)  # a first line that tells spreadsheets what separates fields
_JSON_LINES = (".jsonl", ".ndjson")
_ENDINGS = (*_DELIMITERS, *_JSON_LINES)
_METADATA = ("metadata.csv", "metadata.jsonl")  # of the Hugging Face hub's imagefolder: files below its own folder
_NUM_PROBED = 16  # rows of a table, of which one file at least must exist
Row = tuple[int, Mapping[str, Any]]  # its line, and the values by column
_log = logging.getLogger(__name__)


class CaptionedFolder(ImageDataset):
    """Read the images below `root` with `caption` and, if a column is given for it, `class_label`.

    Labels that are not whole numbers are numbered in alphabetical order; `class_names` lists them. Rows without a
    value in one of the columns are dropped and counted. Raises UserError for missing folders, tables, columns and
    captions.

    Args:
        captions: a CSV, TSV or JSON lines file, also relative to `root`; None for `name.txt` next to `name.jpg`, or
            else the files `metadata.jsonl` or `metadata.csv` at any depth (the Hugging Face hub's imagefolder).
        columns: the column of the table for `file` (path below `root`, in metadata below its own folder), `caption`,
            and any other key of the batch, e.g. {file: image, caption: text, class_label: species}. By default `file`
            is `file` or `file_name`, and `caption` is `caption`, which may be absent where others are named. If a
            caption of a JSON lines file is a list, each epoch draws one of its entries.
        kwargs: the options of `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Sides,
        captions: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.root = existing_folder(root)
        self._table: Table | None = None
        self._texts: dict[str, str] = {}  # of images without a table, by their path without its ending
        if captions is not None:
            self._read_tables({self._table_path(captions): ""}, columns, str(captions))
        elif metadata := self._find_metadata(are_wanted=columns is not None):
            listed = self._read_tables(metadata, columns, str(root))
            left = sorted(set(find_images(self.root)) - {PurePosixPath(name).as_posix() for name in listed})
            if left:
                _log.warning("%s: %d images have no row in the metadata, the first is %s", root, len(left), left[0])
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

    def _find_metadata(self, are_wanted: bool) -> dict[Path, str]:
        """Return the files of metadata that are to be read, each with its folder below `root`.

        Texts beside the images come before them unless `are_wanted`. Raises UserError for several splits, and for two
        files in one folder.
        """
        names = [name for name in find_files(self.root, _ENDINGS) if PurePosixPath(name).name.lower() in _METADATA]
        if not names:
            return {}
        images, texts = find_images(self.root), set(map(_stem, find_files(self.root, [".txt"])))
        if not are_wanted and any(_stem(name) in texts for name in images):
            _log.warning("%s: images have texts beside them, so that %s is not read", self.root, names[0])
            return {}
        check_one_split(self.root, names)
        folders = [name.rpartition("/")[0] for name in names]
        if len(set(folders)) < len(folders):
            raise UserError(f"{self.root}: a folder has {' and '.join(_METADATA)}; set captions to one of them")
        return {self.root / name: folder for name, folder in zip(names, folders, strict=True)}

    def _read_tables(self, tables: Mapping[Path, str], columns: Mapping[str, str] | None, source: str) -> list[str]:
        """Read tables as one, each with the folder below `root` that its paths start from; return the images' names."""
        self._table = Table({"file": None, "caption": None, **(columns or {})})
        names = [name for path, folder in tables.items() for name in self._rows_of(self._table, path, folder)]
        self._table.pop("file")
        self._table.number_labels()
        self._table.select(self._index(names, source))
        self.class_names = self._table.class_names
        return names

    def _table_path(self, captions: str | Path) -> Path:
        candidates = [Path(captions).expanduser(), self.root / captions]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise UserError(f"{captions}: no such file, neither here nor in {self.root}; set captions to a table")
        return found

    def _rows_of(self, table: Table, path: Path, folder: str) -> list[str]:
        """Read a file, whose paths start from a folder below `root`, into the table; return the names of the images."""
        rows = _read_rows(path, table.candidates)
        if rows:
            known = dict.fromkeys(name for _, row in rows for name, value in row.items() if value is not None)
            table.choose_columns(known, str(path))
        values = {column: [row.get(column) for _, row in rows] for column in table.columns.values()}
        given = values[table.columns["file"]]
        files = [None if file is None else written_path(str(file)) for file in given]
        kept = table.add(values, files, str(path), lambda i: f"line {rows[i][0]}")
        names = [f"{folder}/{files[i]}" if folder else str(files[i]) for i in kept]
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
            text = read_text(path)
            if said := _SAYS.match(text):
                return list(_csv_rows(text[said.end() :], said[1], columns, path, first=2))
            return list(_csv_rows(text, _delimiter(text, ending), columns, path))
        if ending in _JSON_LINES:
            return list(_json_rows(read_text(path), path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    raise UserError(f"{path}: captions must be a .csv, .tsv or .jsonl file")


def _delimiter(text: str, ending: str) -> str:
    """Return what separates the fields: in many countries spreadsheets write semicolons into a .csv."""
    header = text.partition("\n")[0]
    return ";" if ending == ".csv" and header.count(";") > header.count(",") else _DELIMITERS[ending]


def _csv_rows(text: str, delimiter: str, columns: Collection[str], path: Path, first: int = 1) -> Iterator[Row]:
    """Yield rows with the numbers of their lines, that of the header being `first`. Raises UserError."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    remedy = f'put texts with {delimiter!r} or " into double quotes, and double the " in them'
    line = first
    try:
        header = [name.strip() for name in next(reader, [])]
        if twice := [name for name in columns if header.count(name) > 1]:
            raise UserError(f"{path}: line {line}: {header.count(twice[0])} columns are named {twice[0]!r}; rename")
        line = reader.line_num + first
        for values in reader:
            if any(value.strip() for value in values[len(header) :]):
                raise UserError(f"{path}: line {line} has {len(values)} fields, the header {len(header)}; {remedy}")
            if values:
                yield line, dict(zip(header, values, strict=False))
            line = reader.line_num + first
    except csv.Error as error:
        if "field limit" in str(error):
            remedy = 'close the " of a text that may have begun there, or shorten it'
        raise UserError(f"{path}: line {line}: {error}; {remedy}") from error


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, object_pairs_hook=_distinct)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}: line {number} is no object; write {{"file": ..., "caption": ...}}')
        yield number, row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("it has a key twice")
    return dict(pairs)
