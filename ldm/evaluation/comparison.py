"""Compare two results, unless they differ in what values depend on besides the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.intervals import GROUPS, Difference, difference
from ldm.evaluation.resumable import differences, with_current_names

Content = dict[str, Any]
# How values are measured. The rest (weights, sampler, steps, guidance, seeds, ...) is what comparisons are about.
_SUBJECT = ("conditions", "conditions_sha256", "data_sha256", "latent")  # of images whose making is known
_MATTERS = ("n", "pixels", "extractor", "reference", "size", *_SUBJECT)
_NOT_SHOWN = ("values", "intervals", "labels", "metrics", "made", "reference", "neighbours", "n")


@dataclass(frozen=True)
class Comparison:
    """Values and differences by name, names of values that one alone has, and the settings that differ as they may."""

    values: dict[str, tuple[float, float]]
    differences: dict[str, Difference]
    alone: list[str]
    settings: list[str]


def read_result(path: Path) -> Content:
    """Read evaluation.json, also with names of former versions. UserError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict) or not {"values", "n", "kind", "metrics"} <= set(content):
        raise UserError(f"{path}: is no result of scripts/evaluate.py")
    if problem := _problem(content):
        raise UserError(f"{path}: {problem}; evaluate again")
    return with_current_names(content)


def _problem(content: Content) -> str:
    """Return what is damaged of count, values and intervals, "" for nothing; older results have no intervals."""
    if not isinstance(content["n"], int) or not _are_numbers(content["values"], dict):
        return "n and values are not numbers"
    if not isinstance(content["metrics"], dict) or not isinstance(content["kind"], str):
        return "metrics are no mapping or the kind is no word"
    if not isinstance(content.get("reference") or {}, dict):
        return "reference is no mapping"
    intervals = content.get("intervals", {})
    entries = intervals.values() if isinstance(intervals, dict) else [intervals]
    lists = [entry.get("deviations") if isinstance(entry, dict) else None for entry in entries]
    if not all(_are_numbers(part, list) and len(part) in (0, GROUPS) for part in lists):
        return f"intervals: are not of {GROUPS} deviations each"
    return ""


def _are_numbers(values: Any, kind: type) -> bool:
    if not isinstance(values, kind):
        return False
    numbers = values.values() if isinstance(values, dict) else values
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 for value in numbers
    )


def compare(first: Content, second: Content) -> Comparison:
    """Compare two results. UserError, naming all reasons, if their values were not measured in the same way."""
    wrong = _measured_differently(first, second)
    if wrong:
        raise UserError(f"these cannot be compared: {'; '.join(wrong)}")
    common = [name for name in first["values"] if name in second["values"]]
    if not common:
        raise UserError("these cannot be compared: they have no value in common")
    alone = [name for part, other in ((first, second), (second, first)) for name in part["values"]
             if name not in other["values"]]  # fmt: skip
    kept = [{key: value for key, value in part.items() if key not in _NOT_SHOWN} for part in (first, second)]
    values = {name: (first["values"][name], second["values"][name]) for name in common}
    return Comparison(values, {name: difference(first, second, name) for name in common}, alone, differences(*kept))


def _measured_differently(first: Content, second: Content) -> list[str]:
    sides = [_measurement(part) for part in (first, second)]
    common = set(first["metrics"]) & set(second["metrics"])
    sides = [{**side, "metrics": {name: side["metrics"][name] for name in sorted(common)}} for side in sides]
    kinds = {first["kind"], second["kind"]}
    if "images" in kinds:  # of a folder, how they were made is not known
        sides = [{key: value for key, value in side.items() if key not in _SUBJECT} for side in sides]
        kinds -= {"images"}
    wrong = differences(*sides)
    return [*wrong, f"kind: {', '.join(sorted(kinds))}"] if len(kinds) > 1 else wrong


def _measurement(content: Content) -> Content:
    """Return what values depend on; where a reference was read from does not matter, its content does."""
    picked = {key: content[key] for key in _MATTERS if key in content}
    if picked.get("reference"):
        picked["reference"] = {key: value for key, value in picked["reference"].items() if key != "source"}
    if str(picked.get("conditions", "")).startswith("data ("):
        picked["conditions"] = "data"
    return {**picked, "metrics": content["metrics"]}
