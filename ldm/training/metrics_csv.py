"""metrics.csv: one row per logging event; a resumed run goes on in the same file."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class MetricsCsv(Logger):
    """Append each logging event to a CSV file with columns step, epoch and then every metric seen so far.

    When a run is resumed, rows of steps that are trained again are dropped at the first new event.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Give the name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Give the (only) version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved configuration lies in the run folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row."""
        row = {"step": str(step), **{name: _text(value) for name, value in metrics.items()}}
        if self._columns is None:
            self._continue(int(step or 0))
        new = [name for name in row if name not in self._columns]
        if new:
            self._rewrite(self._read(), self._columns + sorted(new))
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _continue(self, first_step: int) -> None:
        rows = [row for row in self._read() if int(row["step"]) < first_step]
        self._rewrite(rows, list(rows[0]) if rows else ["step", "epoch"])

    def _read(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self._columns = columns
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{float(value):.6g}"
