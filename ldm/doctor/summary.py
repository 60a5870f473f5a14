"""Figures of the items of a data set, and where they break the definition of a key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SLACK = 1e-4
_MOST_LABELS = 1_000_000


class Summary:
    """Collect figures item by item; the first item defines the keys."""

    def __init__(self) -> None:
        self.num_items = 0
        self._columns: dict[str, _Tensors | _Texts | _Numbers | _Others] = {}
        self._absent: Counter[str] = Counter()

    @property
    def keys(self) -> list[str]:
        """Return the keys of the items."""
        return list(self._columns)

    def add(self, item: Mapping[str, Any]) -> None:
        """Add an item."""
        for key in item.keys() | self._columns.keys():
            if key not in item or (key not in self._columns and self.num_items):
                self._absent[key] += 1
        for key, value in item.items():
            if key not in self._columns:
                self._columns[key] = _column(key, value)
            self._columns[key].add(value)
        self.num_items += 1

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Return the most frequent shape of the tensors under a key, None if there are none."""
        column = self._columns.get(key)
        return column.shapes.most_common(1)[0][0] if isinstance(column, _Tensors) else None

    def dtype(self, key: str) -> torch.dtype | None:
        """Return the type of the tensors under a key, None if there are none."""
        column = self._columns.get(key)
        return column.dtype if isinstance(column, _Tensors) else None

    def indices(self, key: str) -> list[int]:
        """Return the whole numbers under a key: all single ones, or the smallest and the largest in tensors."""
        column = self._columns.get(key)
        if isinstance(column, _Numbers):
            return [int(value) for value in column.counts]
        if not isinstance(column, _Tensors) or column.dtype.is_floating_point or not column.num_values:
            return []
        return [int(column.low), int(column.high)]

    def counts(self, key: str) -> Counter[float]:
        """Return how often each number occurs under a key, nothing if there are none."""
        column = self._columns.get(key)
        return column.counts if isinstance(column, _Numbers) else Counter()

    def lines(self) -> list[str]:
        """Describe each key in a line."""
        return [f"{key}: {column.line()}" for key, column in self._columns.items()]

    def problems(self) -> list[str]:
        """Describe each problem in a line."""
        found = [f"{key}: not every item has it" for key in self._absent]
        return found + [f"{key}: {problem}" for key, column in self._columns.items() for problem in column.problems()]


class _Tensors:
    def __init__(self, key: str) -> None:
        self.rule, self.broken = _RULES.get(key), ""
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.low, self.high, self.total, self.num_values, self.dtype = float("inf"), float("-inf"), 0.0, 0, None
        self.num_not_finite = 0

    def add(self, value: Any) -> None:
        tensor = torch.as_tensor(value)
        self.shapes[tuple(tensor.shape)] += 1
        self.dtype = tensor.dtype
        if not tensor.numel() or tensor.is_complex():
            return
        if not bool(torch.isfinite(tensor.float()).all()):
            self.num_not_finite += 1
            return
        self.low, self.high = min(self.low, tensor.min().item()), max(self.high, tensor.max().item())
        self.total, self.num_values = self.total + tensor.double().sum().item(), self.num_values + tensor.numel()
        if self.rule is not None and not self.broken and not self.rule[1](tensor):
            self.broken = f"should hold {self.rule[0]}, is in {tensor.min().item():g}..{tensor.max().item():g}"

    def line(self) -> str:
        shapes = ", ".join(f"{list(shape)}" for shape, _ in self.shapes.most_common(3))
        mean = self.total / max(1, self.num_values)
        return f"{shapes} {str(self.dtype).removeprefix('torch.')}, {self.low:.3f} to {self.high:.3f}, mean {mean:.3f}"

    def problems(self) -> list[str]:
        found = [self.broken] if self.broken else []
        if len(self.shapes) > 1:
            found.append(f"has {len(self.shapes)} shapes, which make no batch: {sorted(self.shapes)[:3]}")
        if self.num_not_finite:
            found.append(f"holds NaN or infinite values in {self.num_not_finite} items")
        return found


class _Texts:
    def __init__(self) -> None:
        self.example, self.num, self.num_empty, self.num_words, self.longest = "", 0, 0, 0, 0
        self.different: set[int] = set()

    def add(self, value: Any) -> None:
        words = len(str(value).split())
        self.num, self.num_empty = self.num + 1, self.num_empty + (words == 0)
        self.num_words, self.longest = self.num_words + words, max(self.longest, words)
        self.example = self.example or str(value)
        self.different.add(hash(str(value)))

    def line(self) -> str:
        empty = f", {self.num_empty:,} empty" if self.num_empty else ""
        words = f"{self.num_words / self.num:.1f} words on average, at most {self.longest}"
        return f"text, {words}, {len(self.different):,} different{empty}, e.g. {self.example[:60]!r}"

    def problems(self) -> list[str]:
        return ["all texts are empty"] if self.num_empty == self.num else []


class _Numbers:
    def __init__(self, key: str) -> None:
        self.counts: Counter[float] = Counter()
        self.is_label = key == "class_label"

    def add(self, value: Any) -> None:
        self.counts[value] += 1

    def line(self) -> str:
        (common, often), kinds = self.counts.most_common(1)[0], len(self.counts)
        return f"number, {min(self.counts)} to {max(self.counts)}, {kinds} different, most often {common} ({often:,}x)"

    def problems(self) -> list[str]:
        is_wrong = self.is_label and (min(self.counts) < 0 or max(self.counts) >= _MOST_LABELS)
        return ["labels must count from 0"] if is_wrong else []


class _Others:
    def __init__(self) -> None:
        self.kind = ""

    def add(self, value: Any) -> None:
        self.kind = self.kind or type(value).__name__

    def line(self) -> str:
        return self.kind

    def problems(self) -> list[str]:
        return []


def _column(key: str, value: Any) -> _Tensors | _Texts | _Numbers | _Others:
    if isinstance(value, str):
        return _Texts()
    if isinstance(value, (int, float)):
        return _Numbers(key)
    return _Tensors(key) if isinstance(value, (Tensor, np.ndarray)) else _Others()


def _within(low: float, high: float) -> Callable[[Tensor], bool]:
    return lambda value: bool(value.min() >= low - _SLACK and value.max() <= high + _SLACK)


def _is_map(value: Tensor) -> bool:
    return value.ndim == 2 and not value.is_floating_point() and value.min().item() >= -1


def _is_normalised(value: Tensor) -> bool:
    return bool(((value.float().norm(dim=-1) - 1).abs() < 1e-2).all())


_IMAGE = "values in -1..1", _within(-1, 1)
_RULES: dict[str, tuple[str, Callable[[Tensor], bool]]] = {
    "image": _IMAGE,
    "low_res": _IMAGE,
    "masked_image": _IMAGE,
    "mask": ("-1 and +1 only", lambda value: bool((value.abs() == 1).all())),
    "segmentation": ("class indices (H, W), -1 for none", _is_map),
    "boxes": ("left, top, width, height in 0..1", _within(0, 1)),
    "neighbours": ("embeddings of norm 1", _is_normalised),
}
