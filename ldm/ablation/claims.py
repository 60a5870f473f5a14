"""Whether a study shows what papers say: differences between groups of its trials, with intervals over the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ldm.ablation.study import Claim
from ldm.ablation.tables import STEPS, Row, half_width, less_is_better


def verdicts(claims: Sequence[Claim], rows: Sequence[Row], curve_steps: int) -> list[Row]:
    """Return a row for each claim, from the rows of the evaluations at the end of all trainings."""
    return [_verdict(claim, [row for row in rows if row[STEPS] == (claim.steps or curve_steps)]) for claim in claims]


def _verdict(claim: Claim, rows: Sequence[Row]) -> Row:
    """Compare the two groups by seed: what differs between seeds alone is no effect."""
    better, worse = (_by_seed(claim.metric, rows, group) for group in (claim.better, claim.worse))
    gains = [worse[seed] - better[seed] for seed in better if seed in worse]
    if not less_is_better(claim.metric):
        gains = [-gain for gain in gains]
    found: Row = {"claim": claim.says, "better": _named(claim.better), "worse": _named(claim.worse)}
    found |= {"metric": claim.metric, "seeds": len(gains)}
    if len(gains) < 2:
        return found | {"here": "not decided: it takes two seeds or more"}
    gain, half = fmean(gains), half_width(gains)
    found |= {f"{name} group": fmean(group.values()) for name, group in (("better", better), ("worse", worse))}
    return found | {"gain, 95% interval": f"{gain:.4g} ± {half:.2g}", "here": _seen(gain, half)}


def _seen(gain: float, half: float) -> str:
    if gain - half > 0:
        return "shown"
    return "the opposite is seen" if gain + half < 0 else "not shown at this size"


def _by_seed(metric: str, rows: Sequence[Row], group: Mapping[str, Any]) -> dict[int, float]:
    """Return the mean of a metric over the trials of a group, by seed; where it was not measured, nothing."""
    values: dict[int, list[float]] = {}
    for row in rows:
        column = next((name for name in row if metric in (name, name.split("[")[0])), None)
        if column is not None and all(row[axis] == value for axis, value in group.items()):
            values.setdefault(row["seed"], []).append(row[column])
    return {seed: fmean(found) for seed, found in values.items()}


def _named(group: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis}={value}" for axis, value in group.items())
