"""Two results side by side, unless they differ in what figures depend on beside the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.resumable import differences

Content = dict[str, Any]
# How figures are measured. The rest (weights, sampler, steps, guidance, seeds, ...) is what comparisons are about.
_SUBJECT = ("conditions", "conditions_sha256", "data_sha256", "latent")  # of pictures whose making is known
_MATTERS = ("n", "pixels", "extractor", "reference", "size", *_SUBJECT)
_NOT_SHOWN = ("values", "labels", "metrics", "made", "reference", "neighbours", "n")


@dataclass(frozen=True)
class Comparison:
    """Figures of both by name, figures of one alone, and the settings in which the two differ as they may."""

    figures: dict[str, tuple[float, float]]
    alone: list[str]
    settings: list[str]


def read_result(path: Path) -> Content:
    """Read a result. UserError for what is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict) or not {"values", "n", "kind", "metrics"} <= set(content):
        raise UserError(f"{path}: is no result of scripts/evaluate.py")
    return content


def compare(first: Content, second: Content) -> Comparison:
    """Compare two results. UserError, naming all reasons, if their figures were not measured in the same way."""
    wrong = _measured_differently(first, second)
    if wrong:
        raise UserError(f"these cannot be compared: {'; '.join(wrong)}")
    common = [name for name in first["values"] if name in second["values"]]
    if not common:
        raise UserError("these cannot be compared: they have no figure in common")
    alone = [name for part, other in ((first, second), (second, first)) for name in part["values"]
             if name not in other["values"]]  # fmt: skip
    kept = [{key: value for key, value in part.items() if key not in _NOT_SHOWN} for part in (first, second)]
    figures = {name: (first["values"][name], second["values"][name]) for name in common}
    return Comparison(figures, alone, differences(*kept))


def _measured_differently(first: Content, second: Content) -> list[str]:
    sides = [_measurement(part) for part in (first, second)]
    common = set(first["metrics"]) & set(second["metrics"])
    sides = [{**side, "metrics": {name: side["metrics"][name] for name in sorted(common)}} for side in sides]
    kinds = {first["kind"], second["kind"]}
    if "pictures" in kinds:  # of a folder, whose making nobody noted
        sides = [{key: value for key, value in side.items() if key not in _SUBJECT} for side in sides]
        kinds -= {"pictures"}
    wrong = differences(*sides)
    return [*wrong, f"kind: {', '.join(sorted(kinds))}"] if len(kinds) > 1 else wrong


def _measurement(content: Content) -> Content:
    """Pick what figures depend on; where a reference was read from does not matter, its content does."""
    picked = {key: content[key] for key in _MATTERS if key in content}
    if picked.get("reference"):
        picked["reference"] = {key: value for key, value in picked["reference"].items() if key != "source"}
    if str(picked.get("conditions", "")).startswith("data ("):
        picked["conditions"] = "data"
    return {**picked, "metrics": content["metrics"]}
