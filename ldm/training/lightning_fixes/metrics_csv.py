"""metrics.csv: one row per logging event; a resumed run continues the same file, without gaps or repeated rows.

Works around Lightning 2.6, whose CSVLogger starts a new file for each run and rewrites all of it with each new metric.
"""

from __future__ import annotations

import csv
import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from ldm.writing import replacing

_LOG = logging.getLogger(__name__)


class MetricsCsv(Logger):
    """Append each logging event to a CSV file with columns step, epoch and then every metric logged so far.

    When a run is resumed, rows of steps that are trained again are dropped at the first new event, and missing rows are
    told. Rows that cannot be written, on a full disk say, wait for the next event.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._columns: list[str] | None = None
        self._num_rows = 0
        self._kept_rows: int | None = None
        self._waiting: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        """Return the name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Return the (only) version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved configuration lies in the run folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row."""
        row = {"step": str(step), **{name: _text(value) for name, value in metrics.items()}}
        self._waiting.append(row)
        try:
            self._write()
        except OSError as error:
            _LOG.warning("%s: %d rows could not be written yet: %s", self._path, len(self._waiting), error)

    def go_on_after(self, num_rows: int | None) -> None:
        """Keep so many rows of the file when the next is written; None keeps those of earlier steps."""
        self._kept_rows = num_rows
        self._num_rows = len(self._read())
        if num_rows is not None and self._num_rows < num_rows:
            _LOG.warning("%s: %d of its %d rows are missing", self._path, num_rows - self._num_rows, num_rows)
        elif num_rows is not None:
            self._num_rows = num_rows

    def flush(self) -> int:
        """Write all rows to the disk, and return their number. Raises OSError."""
        self._write()
        if self._path.exists():
            with self._path.open("rb+") as file:
                os.fsync(file.fileno())
        return self._num_rows

    def _write(self) -> None:
        if not self._waiting:
            return
        if self._columns is None:
            self._continue(int(self._waiting[0]["step"]))
        new = {name for row in self._waiting for name in row} - set(self._columns)
        if new:
            self._rewrite(self._read(), self._columns + sorted(new))
        elif not self._path.exists():
            _LOG.warning("%s: was removed with its %d rows; it begins anew", self._path, self._num_rows)
            self._rewrite([], self._columns)
            self._num_rows = 0
        size = self._path.stat().st_size
        try:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="").writerows(self._waiting)
        except OSError:
            os.truncate(self._path, size)  # no half rows
            raise
        self._num_rows += len(self._waiting)
        self._waiting.clear()

    def _continue(self, first_step: int) -> None:
        rows = self._read()
        columns = list(rows[0]) if rows else ["step", "epoch"]
        if self._kept_rows is None:
            rows = [row for row in rows if int(row["step"] or 0) < first_step]
        else:
            rows = rows[: self._kept_rows]
        self._rewrite(rows, columns if rows else ["step", "epoch"])
        self._num_rows = len(rows)

    def _read(self) -> list[dict[str, str]]:
        """Return the rows; a file that is none of ours is put aside, and said."""
        if not self._path.exists():
            return []
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if None not in row and None not in row.values()]  # no half ones
                if reader.fieldnames is None or "step" in reader.fieldnames:
                    return rows
        except (UnicodeDecodeError, csv.Error) as error:
            _LOG.debug("%s: %s", self._path, error)
        names = (f".damaged{number or ''}.csv" for number in count())
        aside = next(path for path in map(self._path.with_suffix, names) if not path.exists())
        os.replace(self._path, aside)
        _LOG.warning("%s: is no table of ours any more; kept as %s, a new one begins", self._path, aside.name)
        return []

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        with replacing(self._path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        self._columns = columns


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{float(value):.6g}"
