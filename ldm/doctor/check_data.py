"""Check what a run would read: counts, shapes, ranges, unreadable files, keys that the model needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ldm.data.core.classes import class_names
from ldm.data.core.derived import source_of
from ldm.data.core.module import errors_of
from ldm.doctor.data_fit import fit_problems, missing_keys
from ldm.doctor.item_sheet import item_sheet
from ldm.doctor.summary import Summary
from ldm.errors import UserError

__all__ = ["DataReport", "check_dataset", "num_to_read"]

_SHOWN = 16


@dataclass(frozen=True)
class DataReport:
    """What was found in a data set: lines of figures, lines of problems, and a sheet of its first items."""

    lines: list[str]
    problems: list[str]
    sheet: Image.Image


def check_dataset(
    dataset: Dataset, num: int = 0, model: nn.Module | None = None, on_item: Callable[[], Any] = lambda: None
) -> DataReport:
    """Read items, and compare each key with its definition: images in [-1, 1], maps of class indices, boxes in [0, 1].

    Raises UserError if no item can be read.

    Args:
        num: how many items to read, evenly spread, of a stream the first ones; 0 for all.
        model: whose needs to compare, may be on meta.
        on_item: called after each item.
    """
    summary, shown = Summary(), []
    for item in _items(dataset, num):
        summary.add(item)
        shown += [item] if len(shown) < _SHOWN else []
        on_item()
    if not summary.num_items:
        raise UserError("no item can be read")
    problems = summary.problems()
    if model is not None:
        problems += [*missing_keys(model, summary.keys), *fit_problems(model, summary, class_names(dataset))]
    lines = [_heading(dataset, summary.num_items), *summary.lines(), *_counts(dataset)]
    return DataReport(lines, problems, item_sheet(shown))


def num_to_read(dataset: Dataset, num: int) -> int | None:
    """Return how many items `check_dataset` reads; None if that is not known."""
    if isinstance(dataset, IterableDataset):
        return num or None
    return min(num or len(dataset), len(dataset))


def _items(dataset: Dataset, num: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(dataset, IterableDataset):
        yield from islice(iter(dataset), num or None)
        return
    for index in np.unique(np.linspace(0, len(dataset) - 1, num_to_read(dataset, num)).round().astype(int)).tolist():
        yield dataset[index]


def _heading(dataset: Dataset, num_items: int) -> str:
    source = source_of(dataset)
    inner = "" if source is dataset else f" of {type(source).__name__}"
    amount = "a stream" if isinstance(dataset, IterableDataset) else f"{len(dataset):,} items"
    return f"{type(dataset).__name__}{inner}, {amount}, {num_items:,} read"


def _counts(dataset: Dataset) -> list[str]:
    errors, names, lines = errors_of(dataset), class_names(dataset), []
    if errors is not None and errors.num_unreadable:
        lines.append(f"  {errors.num_unreadable:,} files cannot be read, of those that were tried; see the messages")
    if errors is not None and errors.num_empty:
        empty = "captions are empty, or masks without a hole or all hole"
        lines.append(f"  {errors.num_empty:,} {empty}, of those that were read; see the messages")
    if names:
        lines.append(f"  {len(names)} classes: {', '.join(names[:10])}{' ...' * (len(names) > 10)}")
    return lines
