"""What tables of captions and labels share, as CSV, JSON lines or Parquet: labels as numbers, choices, gaps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["LABEL", "complete_rows", "draw_entry", "number_labels"]

CAPTION, LABEL = "caption", "class_label"
_log = logging.getLogger(__name__)


def number_labels(labels: Sequence[Any]) -> tuple[list[int], list[str]]:
    """Return labels as numbers, and the class names: [] for whole numbers, which stay; otherwise sorted, by label."""
    texts = [str(label).strip() for label in labels]
    if all(text.removeprefix("-").isdigit() for text in texts):
        return [int(text) for text in texts], []
    names = sorted(set(texts))
    rank = {name: i for i, name in enumerate(names)}
    return [rank[text] for text in texts], names


def draw_entry(key: str, value: Any, rng: np.random.Generator) -> Any:
    """Return the value; draw one entry if it is a list. Captions become str (empty list -> '')."""
    if isinstance(value, list) and value:
        value = value[int(rng.integers(len(value)))]
    if key != CAPTION:
        return value
    return "" if value is None or isinstance(value, list) else str(value).strip()


def complete_rows(columns: Mapping[str, Sequence[Any]], source: str, first_row: int = 0) -> list[int]:
    """Return the positions of the rows that have a value in every column; log how many others are dropped.

    columns: the values by the names of the columns in the table; source: the table, and first_row: the number of its
    first row, for the message.
    """
    rows = list(zip(*columns.values(), strict=True))
    kept = [i for i, row in enumerate(rows) if None not in row]
    if len(kept) < len(rows):
        first = next(i for i, row in enumerate(rows) if None in row)
        _log.warning(
            "%s: %d of %d rows have nothing under one of %s and are left out, the first is row %d",
            source, len(rows) - len(kept), len(rows), ", ".join(columns), first + first_row,
        )  # fmt: skip
    return kept
