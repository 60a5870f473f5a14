"""What a run folder shows: curves, images over time, config, evaluations. Nothing in it is written or executed.

A run may be written while it is read, or be broken: what cannot be read is said in words, and the rest is shown.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.config.files import config_of_run
from ldm.errors import UserError, shown

_IMAGE = re.compile(r"(?P<name>[\w-]+)_gs-(?P<step>\d+)_e-\d+_b-\d+\.png")
_LONGEST_TEXT = 1_000_000  # characters of a config that are shown
_LARGEST_FILE = 64 << 20  # bytes that are read at once
_END_OF_PNG = b"IEND\xaeB`\x82"
_SHEET = "samples.png"  # beside an evaluation
_MOST_POINTS = 2000  # of a curve; more are thinned out
Point = tuple[float, float]


@dataclass(frozen=True)
class RunView:
    """A run folder as it is now."""

    folder: Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    def problem(self) -> str:
        """Return what is wrong with the run, empty if nothing is."""
        if not self.folder.is_dir():
            return f"{self.folder}: there is no such folder"
        if config_of_run(self.folder) is None:
            return f"{self.folder}: has no config; is it a run folder?"
        return ""

    def curves(self) -> dict[str, list[Point]]:
        """Return (step, value) of every column of metrics.csv; rows that are being written are left out.

        UserError for a file that cannot be read.
        """
        file = self.folder / "metrics.csv"
        if not file.exists():
            return {}
        try:
            stamp = self._own(file).stat()
            return _curves(file, stamp.st_mtime_ns, stamp.st_size)
        except (OSError, csv.Error) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error

    def images(self) -> dict[str, list[tuple[int, str]]]:
        """Return for each kind of image, such as val/samples, its steps and files, relative to the run, by step."""
        found: dict[str, list[tuple[int, str]]] = {}
        for file in sorted(self.folder.glob("images/*/*.png")):
            if match := _IMAGE.fullmatch(file.name):
                kind = f"{file.parent.name}/{match['name']}"
                found.setdefault(kind, []).append((int(match["step"]), file.relative_to(self.folder).as_posix()))
        return {kind: sorted(entries) for kind, entries in found.items()}

    def image(self, relative: str) -> bytes:
        """Return the bytes of one of `images`. UserError for any other file, and for one in the making."""
        if relative not in {file for entries in self.images().values() for _, file in entries}:
            raise UserError(f"{shown(relative)}: is no image of {self.name}")
        try:
            content = self._own(self.folder / relative).read_bytes()
        except OSError as error:
            raise UserError(f"{relative}: cannot be read ({error.strerror})") from error
        if not content.endswith(_END_OF_PNG):
            raise UserError(f"{relative}: is being written")
        return content

    def config(self) -> str:
        """Return the text of the resolved config. UserError if there is none."""
        file = config_of_run(self.folder) if self.folder.is_dir() else None
        if file is None:
            raise UserError(self.problem() or f"{self.folder}: has no config")
        try:
            return self._own(file).read_text(encoding="utf-8", errors="replace")[:_LONGEST_TEXT]
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error

    def evaluations(self) -> list[dict[str, Any]]:
        """Return name, number of images, figures and whether there is a sheet of each evaluation.json below the run.

        A figure is {name, label, value, interval}: the interval is None where the file has none, and the value where it
        is no finite number. One that cannot be read has a `problem` instead.
        """
        return [self._evaluation(file) for file in self._results()]

    def sheet(self, number: int) -> bytes:
        """Return the images beside an evaluation, by its position in `evaluations`. UserError without them."""
        results = self._results()
        if number >= len(results):
            raise UserError(f"evaluation {number}: {self.name} has {len(results)}")
        try:
            return self._own(results[number].parent / _SHEET).read_bytes()
        except OSError as error:
            raise UserError(f"{results[number].parent / _SHEET}: cannot be read ({error.strerror})") from error

    def _own(self, file: Path) -> Path:
        """Return a file of the run. UserError for a link that leads out of it, for what is no file, and a huge one."""
        real = file.resolve()
        if file.exists() and not (real.is_relative_to(self.folder.resolve()) and real.is_file()):
            raise UserError(f"{file}: is no file of the run")
        if file.exists() and real.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{file}: is larger than {_LARGEST_FILE >> 20} MB")
        return file

    def _results(self) -> list[Path]:
        return sorted(self.folder.glob("**/evaluation.json"))

    def _evaluation(self, file: Path) -> dict[str, Any]:
        name, has_sheet = file.parent.relative_to(self.folder).as_posix(), (file.parent / _SHEET).is_file()
        try:
            content = json.loads(self._own(file).read_text(encoding="utf-8"))
            values, labels, intervals = (dict(content.get(key) or {}) for key in ("values", "labels", "intervals"))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, UserError) as error:
            return {"name": name, "problem": f"{file}: cannot be read ({shown(str(error))}); is it being written?"}
        figures = [
            {"name": key, "label": labels.get(key, key), "value": _number(value), "interval": _ends(intervals.get(key))}
            for key, value in values.items()
            if isinstance(value, int | float)
        ]
        return {"name": name, "n": _number(content.get("n")), "figures": figures, "sheet": has_sheet}


def difference(a: RunView, b: RunView) -> list[str]:
    """Return the lines in which the configs of two runs differ, with three lines around each, as `diff -u` writes."""
    texts = (run.config().splitlines() for run in (a, b))
    return list(difflib.unified_diff(*texts, a.name, b.name, lineterm=""))


def find_runs(paths: list[Path]) -> list[RunView]:
    """Return the runs that paths name: run folders, or folders of them, newest first. UserError if there is none."""
    found: dict[Path, None] = {}
    for path in paths:
        path = path.expanduser()
        inner = sorted((child for child in path.glob("*") if (child / "configs").is_dir()), reverse=True)
        is_run = (path / "configs").is_dir() or not inner
        found |= dict.fromkeys([path] if is_run else inner)
    runs = [RunView(path) for path in found]
    if all(run.problem() for run in runs):
        raise UserError(runs[0].problem() if runs else "serve: name a run folder, or a folder of them")
    return runs


class Runs:
    """The runs that paths name, also those that begin while they are watched; each keeps its number."""

    def __init__(self, paths: list[Path]) -> None:
        """Find the runs. UserError if there is none."""
        self._paths, self._runs = paths, find_runs(paths)
        self._first = len(self._runs)  # how many there were at the beginning, in their order
        self._lock = threading.Lock()

    def now(self) -> list[tuple[int, RunView]]:
        """Return the runs with their numbers, new ones first; those that are gone say so."""
        with self._lock, suppress(UserError):  # all of them may be gone
            new = [run for run in find_runs(self._paths) if run not in self._runs]
            self._runs += reversed(new)
        known = list(enumerate(self._runs))
        return [*reversed(known[self._first :]), *known[: self._first]]

    def __len__(self) -> int:
        """Return how many there are, those that are gone included."""
        return len(self._runs)

    def __getitem__(self, number: int) -> RunView:
        """Return a run by its number."""
        return self._runs[number]


@lru_cache(maxsize=64)
def _curves(file: Path, changed: int, size: int) -> dict[str, list[Point]]:
    """Read the curves of a file, again when its time or size has changed."""
    curves: dict[str, list[Point]] = {}
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        for row in csv.DictReader(lines):
            step = _number(row.pop("step", None))
            for name, text in row.items():
                value = _number(text)
                if step is not None and value is not None and isinstance(name, str) and name != "epoch":
                    curves.setdefault(name, []).append((step, value))
    return {name: _thinned(points) for name, points in sorted(curves.items())}


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < float("inf") else None


def _ends(interval: Any) -> list[float] | None:
    """Return the two ends of an interval {low, high}, None for anything else."""
    ends = [_number(interval.get(end)) for end in ("low", "high")] if isinstance(interval, dict) else [None]
    return None if None in ends else ends


def _thinned(points: list[Point]) -> list[Point]:
    """Return at most `_MOST_POINTS` points, means of neighbours, so that a spike of many points still shows."""
    group = -(-len(points) // _MOST_POINTS)
    if group <= 1:
        return points
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
