"""What tables of captions and labels share, in CSV, JSON lines, Parquet or shards: gaps, choices, numbered labels."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.core.files import is_litter, plain_text
from ldm.errors import UserError

__all__ = ["LABEL", "Table", "drawn_entry", "is_nothing", "whole_number"]

CAPTION, LABEL = "caption", "class_label"
_FILE = "file"
_USUAL = {_FILE: ("file", "file_name"), CAPTION: ("caption",)}  # the columns of keys that name none
_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")  # what a tensor holds
_log = logging.getLogger(__name__)


class Table:
    """The keys of a batch besides the image, from the rows of one table after the other.

    columns: the column of each key; None for the usual one, `file` or `file_name`, and `caption`. Where others
    are asked for, a table need not have the usual caption. `class_names` lists the classes, if labels were names.
    """

    def __init__(self, columns: Mapping[str, str | None]) -> None:
        self.columns = dict(columns)
        self.class_names: list[str] = []
        self._values: dict[str, list[Any]] = {key: [] for key in columns}

    def add(
        self,
        columns: Mapping[str, Sequence[Any]],
        files: Sequence[str | None],
        source: str,
        place: Callable[[int], str],
    ) -> list[int]:
        """Add the rows that have a value in every column, and whose file is no litter; return their positions.

        The others are counted, and the first is named in the log.

        Args:
            columns: the values by the names of the columns.
            files: the file of each row, None where it is not known.
            source: the table, for messages.
            place: where in the table a row stands, for messages.

        Raises UserError for a value that is neither text nor a number nor a list of these.
        """
        values = {key: columns[column] for key, column in self.columns.items()}
        litter = {i for i, file in enumerate(files) if file is not None and is_litter(file)}
        kept, incomplete = [], []
        for i in range(len(files)):
            if i in litter:
                continue
            for key, entries in values.items():
                if problem := _problem(key, entries[i]):
                    raise UserError(f"{source}: {place(i)}: {self.columns[key]!r} {problem}")
            is_complete = not any(_is_missing(key, entries[i]) for key, entries in values.items())
            (kept if is_complete else incomplete).append(i)
        if incomplete:
            _log.warning(
                "%s: %d of %d rows have nothing under one of %s and are left out, the first is %s",
                source, len(incomplete), len(files), ", ".join(self.columns.values()), place(incomplete[0]),
            )  # fmt: skip
        if litter:
            _log.warning(
                "%s: %d rows name no images of yours but %s ... and are left out",
                source,
                len(litter),
                files[min(litter)],
            )
        for key, entries in values.items():
            self._values[key] += [entries[i] for i in kept]
        return kept

    @property
    def candidates(self) -> list[str]:
        """List the columns that are read, with all the usual ones of keys that name none."""
        return [name for key, column in self.columns.items() for name in ([column] if column else _USUAL[key])]

    def choose_columns(self, known: Collection[str], source: str) -> None:
        """Choose the columns of keys that name none. Raises UserError for a column that is not known in a table."""
        for key, column in list(self.columns.items()):
            names = [column] if column else _USUAL[key]
            found = next((name for name in names if name in known), None)
            if found is not None:
                self.columns[key] = found
            elif column is None and key == CAPTION and self.columns.keys() - _USUAL.keys():
                del self.columns[key], self._values[key]
            else:
                raise UserError(
                    f"{source}: no column {names[0]!r} for {key!r}, it has {', '.join(known)}; set columns.{key}=NAME"
                )

    def number_labels(self, names: Callable[[], list[str]] = list) -> None:
        """Turn labels into numbers. `names` are those of labels that are numbers already, if they are known."""
        if LABEL in self._values:
            self._values[LABEL], self.class_names = _numbered(self._values[LABEL])
            self.class_names = self.class_names or names()

    def pop(self, key: str) -> list[Any]:
        """Take the values of a key out."""
        return self._values.pop(key)

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order."""
        self._values = {key: [values[i] for i in rows] for key, values in self._values.items()}

    def read(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return the keys of a row, drawn from lists."""
        return {key: drawn_entry(key, values[row], rng) for key, values in self._values.items()}


def drawn_entry(key: str, value: Any, rng: np.random.Generator) -> Any:
    """Return a text or a number: the value, or one entry of a list of them ('' of an empty one). Captions are texts.

    Raises ValueError for other values.
    """
    if problem := _problem(key, value):
        raise ValueError(f"{key!r} {problem}")
    if isinstance(value, list):
        value = value[int(rng.integers(len(value)))] if value else ""
    if key == CAPTION:
        value = "" if is_nothing(value) else str(value)
    return plain_text(value).strip() if isinstance(value, str) else value


def whole_number(label: Any) -> int | None:
    """Return a label that is a whole number, also as text or as 3.0; None for any other."""
    text = str(label).strip()
    return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) else None


def _numbered(labels: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Return labels as numbers, and the class names: [] for whole numbers, which stay; otherwise sorted, by label."""
    numbers = [whole_number(label) for label in labels]
    if None not in numbers:
        return numbers, []
    texts = [str(label).strip() for label in labels]
    names = sorted(set(texts))
    if len(numbers) > numbers.count(None):
        word = next(text for text, number in zip(texts, numbers, strict=True) if number is None)
        _log.warning("labels: %s is no whole number, so that all are names; they are counted alphabetically", word)
    rank = {name: i for i, name in enumerate(names)}
    return [rank[text] for text in texts], names


def is_nothing(value: Any) -> bool:
    """Return whether a value is absent: null, or NaN, which pandas writes for it."""
    return value is None or value != value


def _is_missing(key: str, value: Any) -> bool:
    """Return whether a row has no value: an empty caption is one, an empty file or class is none."""
    return is_nothing(value) or (key in (_FILE, LABEL) and isinstance(value, str) and not value.strip())


def _problem(key: str, value: Any) -> str | None:
    """Return what a value is instead of a text or a number, or a list of these; None if it is one."""
    entries = value if isinstance(value, list) and key not in (_FILE, LABEL) else [value]
    wrong = next((entry for entry in entries if not isinstance(entry, (str, int, float, type(None)))), None)
    if wrong is None:
        return None
    kind = f"a struct of {', '.join(map(str, wrong))}" if isinstance(wrong, Mapping) else type(wrong).__name__
    return f"is {kind}, neither text nor a number; name a column of plain values"
