"""Compare two results, unless they differ in what values depend on besides the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.resumable import differences, with_current_names

Content = dict[str, Any]
# How values are measured. The rest (weights, sampler, steps, guidance, seeds, ...) is what comparisons are about.
_SUBJECT = ("conditions", "conditions_sha256", "data_sha256", "latent")  # of images whose making is known
_MATTERS = ("n", "pixels", "extractor", "reference", "size", *_SUBJECT)
_NOT_SHOWN = ("values", "labels", "metrics", "made", "reference", "neighbours", "n")


@dataclass(frozen=True)
class Comparison:
    """Values of both by name, names of values of one alone, and the settings that differ as they may."""

    values: dict[str, tuple[float, float]]
    alone: list[str]
    settings: list[str]


def read_result(path: Path) -> Content:
    """Read evaluation.json, also with names of former versions. UserError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict) or not {"values", "n", "kind", "metrics"} <= set(content):
        raise UserError(f"{path}: is no result of scripts/evaluate.py")
    return with_current_names(content)


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
    return Comparison(values, alone, differences(*kept))


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
