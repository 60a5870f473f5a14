"""What scripts/evaluate.py leaves in a folder: evaluation.json with the figures, and a sheet of pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError

RESULT = "evaluation.json"
PICTURES = "samples.png"


@dataclass(frozen=True)
class Outcome:
    """Hold figures by name, how many pictures were judged, the seconds it took to draw them, and a sheet of some."""

    values: dict[str, float]
    count: int
    seconds: float
    pictures: Path | None


def read(folder: Path) -> Outcome:
    """Read the outcome of an evaluation. UserError for a file that is not one."""
    path = folder / RESULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {name: float(value) for name, value in content["values"].items()}
        count, seconds = int(content["n"]), float(content["made"]["draw_seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no result of scripts/evaluate.py: {error}") from error
    pictures = folder / PICTURES
    return Outcome(values, count, seconds, pictures if pictures.is_file() else None)
