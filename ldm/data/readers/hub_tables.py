"""Tables as the Hugging Face hub and its library have them: Parquet, and the Arrow files of `save_to_disk`.

    DIR/data/train-00000-of-00002.parquet ...           the hub
    DIR/data-00000-of-00002.arrow ..., DIR/state.json   Dataset.save_to_disk; state.json names the files in order
    DIR/dataset_dict.json, DIR/train/..., DIR/test/...  DatasetDict.save_to_disk

Arrow files are mapped into memory, streams as the library writes them and files of random access alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import SEEK_END
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ldm.data.core.decoding import damage_is_unreadable
from ldm.data.core.files import find_files, find_tables, read_json
from ldm.data.core.optional import require
from ldm.errors import UserError, shown

__all__ = ["Group", "HubTable", "find_hub_tables", "open_table"]

_ARROW, _PARQUET = ".arrow", ".parquet"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_REMEDY = "set paths to Parquet tables, a folder of them or of save_to_disk, or a pattern"
_RANDOM_ACCESS, _END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


class Group(NamedTuple):
    """The values of a column in rows that are read together, each with `as_py()`, and the memory that they take."""

    values: Sequence[Any]
    nbytes: int


class HubTable(Protocol):
    """A table on the disk: its columns, the number of rows in each of its groups, the metadata of the schema."""

    names: list[str]
    sizes: list[int]
    metadata: Mapping[bytes, bytes]

    def values(self, column: str) -> list[Any]:
        """Return the values of all rows."""

    def paths(self, column: str) -> list[str | None] | None:
        """Return the path beside each image of a column of structs {bytes, path}, None for other columns."""

    def group(self, column: str, number: int) -> Group:
        """Return the values of the rows of one group."""


class ParquetTable:
    """A Parquet table, of which whole row groups are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = require("pyarrow.parquet", f"{path}: a Parquet table", "pyarrow").ParquetFile(path)
        self.names, self.metadata = self._file.schema_arrow.names, self._file.schema_arrow.metadata or {}
        groups = range(self._file.num_row_groups)
        self.sizes = [self._file.metadata.row_group(group).num_rows for group in groups]

    def values(self, column: str) -> list[Any]:
        """Return the values of all rows."""
        with _damage_named(self._path):
            return self._file.read(columns=[column]).column(0).to_pylist()

    def paths(self, column: str) -> list[str | None] | None:
        """Return the path beside each image, without reading the images."""
        leaves = [self._file.schema.column(i).path for i in range(len(self._file.schema))]
        if f"{column}.path" not in leaves:
            return None
        return [value and value.get("path") for value in self.values(f"{column}.path")]

    def group(self, column: str, number: int) -> Group:
        """Read the values of the rows of one group."""
        with damage_is_unreadable():
            values = self._file.read_row_group(number, columns=[column]).column(0)
        return Group(values, values.nbytes)


class ArrowTable:
    """An Arrow file: one group of rows, in mapped memory, of which only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        arrow = require("pyarrow", f"{path}: an Arrow file", "pyarrow")
        with path.open("rb") as file:
            is_stream = file.read(len(_RANDOM_ACCESS)) != _RANDOM_ACCESS
            file.seek(-len(_END_OF_STREAM), SEEK_END)
            if is_stream and file.read() != _END_OF_STREAM:  # which pyarrow takes for an end if whole batches are lost
                raise OSError("the end is missing")
        opened = (arrow.ipc.open_stream if is_stream else arrow.ipc.open_file)(arrow.memory_map(str(path)))
        self._table = opened.read_all()
        self._table.validate()
        self.names, self.metadata = self._table.schema.names, self._table.schema.metadata or {}
        self.sizes = [self._table.num_rows]

    def values(self, column: str) -> list[Any]:
        """Return the values of all rows."""
        return self._table.column(column).to_pylist()

    def paths(self, column: str) -> list[str | None] | None:
        """Return the path beside each image, without reading the images."""
        kind = self._table.schema.field(column).type
        if "path" not in [kind.field(i).name for i in range(kind.num_fields)]:
            return None
        compute = require("pyarrow.compute", "an Arrow file", "pyarrow")
        return compute.struct_field(self._table.column(column), "path").to_pylist()

    def group(self, column: str, number: int) -> Group:
        """Return the values of all rows, which take no memory before they are read."""
        return Group(self._table.column(column), 0)


def open_table(path: Path) -> HubTable:
    """Open a table by its ending. Raises UserError if it is damaged, and without the package pyarrow."""
    kind, what = (ArrowTable, "Arrow file") if path.suffix.lower() == _ARROW else (ParquetTable, "Parquet table")
    with _damage_named(path, what):
        return kind(path)


@contextmanager
def _damage_named(path: Path, what: str = "Parquet table") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # of which ArrowInvalid is one
        raise UserError(f"{path}: not a readable {what} ({shown(' '.join(str(error).split()), 100)})") from error


def find_hub_tables(given: str) -> list[Path]:
    """List the tables that a path, a pattern or a folder means; of a folder of `save_to_disk` those of its state.

    Raises UserError if there are none, if one is missing, and for a folder of several splits.
    """
    folder = Path(given).expanduser()
    if (folder / _SPLITS).is_file():
        splits = _noted(folder / _SPLITS, "splits", str)
        if len(splits) != 1:
            raise UserError(f"{given}: holds the splits {', '.join(splits)}; name one, such as {given}/{splits[0]}")
        return find_hub_tables(f"{given}/{splits[0]}")
    if (folder / _STATE).is_file():
        tables = [folder / str(entry.get("filename")) for entry in _noted(folder / _STATE, "_data_files", dict)]
        if absent := [table.name for table in tables if not table.is_file()]:
            raise UserError(f"{folder / _STATE}: names {absent[0]}, which is not there; copy the whole folder again")
        return tables
    found = find_files(folder, [_ARROW, _PARQUET]) if folder.is_dir() else []
    ending = _ARROW if found and not any(name.lower().endswith(_PARQUET) for name in found) else _PARQUET
    return [Path(table) for table in find_tables(given, ending, "table", _REMEDY, deep=True)]


def _noted(path: Path, key: str, kind: type) -> list[Any]:
    """Return a list that the library has written into a JSON file."""
    content = read_json(path, str(path))
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, kind) for entry in entries):
        raise UserError(f"{path}: has no list {key!r} as save_to_disk writes it; save the data set again")
    return entries
