"""How sure a figure is: 95% intervals over the samples, and whether two figures can be told apart.

The reference is taken as given: an interval says how far the figure would move with other samples of the same model.

    mean of scores     percentiles of the means of resampled scores (bootstrap)      Efron 1979
    share of images    interval of a proportion                                      Wilson 1927
    figures of sets    jackknife: the figure without each of 20 random groups of the samples   Shao & Tu 1995, sec. 2.3

Sets are not resampled. A Fréchet distance of n samples lies above that of infinitely many by about C / n. A resampled
set repeats samples, which adds as much again, so that percentiles of its distances may not even hold the figure itself.
The jackknife measures the spread alone. Its interval is about the mean figure of n samples, with their bias, not
about the figure of infinitely many. In the difference of two figures of n samples the biases cancel, as far as the
models are alike.

Groups depend on n alone. Two evaluations leave out the same positions, so that their differences are paired: what both
have from position i (its caption, its noise, the image that it reconstructs) cancels, and where they share nothing the
variances add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUPS = 20  # at least as many samples are needed
_SEED = 2024
_RESAMPLES = 1000
_DRAWN = 1_000_000  # numbers at a time
_Z = 1.959964  # 97.5% of the normal distribution
_T = 2.093024  # 97.5% of Student's, GROUPS - 1 degrees of freedom
_POWER = 0.841621  # 80% of the normal distribution


@dataclass(frozen=True)
class Spread:
    """The interval (low, high) of a figure, and its deviations where each of `GROUPS` groups is left out.

    deviations: empty where there are too few samples for groups.
    """

    low: float
    high: float
    deviations: tuple[float, ...] = ()

    def content(self) -> dict[str, Any]:
        """Return plain values, deviations with six digits."""
        return {"low": self.low, "high": self.high, "deviations": [float(f"{d:.6g}") for d in self.deviations]}


@dataclass(frozen=True)
class Difference:
    """Of two figures of `count` samples each, second - first; its 95% interval reaches `margin` to either side.

    margin: None where it is not known, as of results without intervals.
    """

    value: float
    margin: float | None
    count: int

    @property
    def is_distinguishable(self) -> bool:
        """Return whether the interval is known and zero is outside."""
        return self.margin is not None and abs(self.value) > self.margin

    @property
    def samples_needed(self) -> int | None:
        """Return how many samples would tell a difference as large as this in four of five trials, to two digits.

        A rough number: it takes the margin to shrink with the root of the count. None for no difference.
        """
        if not self.value or self.margin is None or not math.isfinite(self.margin / self.value):
            return None
        needed = self.count * (self.margin / self.value * (1 + _POWER / _Z)) ** 2
        digits = max(0, math.floor(math.log10(max(needed, 1))) - 1)
        return max(math.ceil(needed / 10**digits) * 10**digits, 2)

    def verdict(self) -> str:
        """Return the interval, whether the two can be told apart, and how many samples might tell; "" if unknown."""
        if self.margin is None:
            return ""
        interval = f"[{self.value - self.margin:+.3g}, {self.value + self.margin:+.3g}]"
        if self.is_distinguishable:
            return interval
        needed = self.samples_needed
        hint = "" if needed is None else f"; about {needed:,} samples might tell"
        return f"{interval} not distinguishable{hint}"


def positions(count: int) -> np.ndarray:
    """Return 0..count - 1 in the order (count,) in which samples are dealt out to groups; depends on `count` alone."""
    return np.random.default_rng([_SEED, count]).permutation(count)


def groups_of(count: int) -> np.ndarray:
    """Return the group of each sample, 0..GROUPS - 1, (count,): random, of equal sizes up to one."""
    groups = np.empty(count, int)
    groups[positions(count)] = np.arange(count) % GROUPS
    return groups


def jackknife(value: float, without: Sequence[float], factor: float = 1.0) -> Spread:
    """Return the spread of a figure from the figures without each group; factor: of the deviations."""
    deviations = factor * (np.asarray(without) - np.mean(without))
    margin = _T * standard_error(deviations)
    return Spread(value - margin, value + margin, tuple(deviations.tolist()))


def standard_error(deviations: Sequence[float] | np.ndarray) -> float:
    """Return the jackknife's standard error of a figure with these deviations."""
    return math.sqrt((GROUPS - 1) / GROUPS * np.square(deviations).sum())


def spread_of_scores(scores: np.ndarray) -> Spread | None:
    """Return the spread of the mean of scores (N,), of a proportion where all are 0 or 1.

    None for fewer than `GROUPS` scores that are no proportion.
    """
    scores, count = np.asarray(scores, np.float64), len(scores)
    is_proportion = np.isin(scores, (0, 1)).all()
    if count < GROUPS:
        return Spread(*wilson(int(scores.sum()), count)) if is_proportion else None
    groups = groups_of(count)
    sums, sizes = np.bincount(groups, scores, GROUPS), np.bincount(groups, minlength=GROUPS)
    found = jackknife(scores.mean(), (scores.sum() - sums) / (count - sizes))
    interval = wilson(int(scores.sum()), count) if is_proportion else _bootstrap(scores)
    return Spread(*interval, found.deviations)


def _bootstrap(scores: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the means of resampled scores."""
    generator, count = np.random.default_rng([_SEED, len(scores)]), len(scores)
    rows = max(1, _DRAWN // count)  # resamples at a time
    sizes = [min(rows, _RESAMPLES - first) for first in range(0, _RESAMPLES, rows)]
    means = np.concatenate([scores[generator.integers(count, size=(size, count))].mean(1) for size in sizes])
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return low, high


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the interval of the share of which `right` of `count` is one sample, in [0, 1]."""
    share, z2 = right / count, _Z**2
    centre = share + z2 / (2 * count)
    margin = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low, high = ((centre + sign * margin) / (1 + z2 / count) for sign in (-1, 1))
    return (low if right else 0.0), (high if right < count else 1.0)


def share_text(right: int, count: int) -> str:
    """Write a count as `199 of 200 (99.5%, 97.2% to 99.9%)`, with its interval."""
    low, high = wilson(right, count)
    return f"{right} of {count} ({right / count:.1%}, {low:.1%} to {high:.1%})"


def interval_text(interval: Mapping[str, Any] | None) -> str:
    """Write an entry of `intervals` of a result as `[low, high]`; "" for none."""
    return "" if interval is None else f"[{interval['low']:.6g}, {interval['high']:.6g}]"


def difference(first: Mapping[str, Any], second: Mapping[str, Any], name: str) -> Difference:
    """Return the difference of one figure of two results of as many samples."""
    entries = [(part.get("intervals") or {}).get(name, {}) for part in (first, second)]
    ours, theirs = (np.asarray(entry.get("deviations", ())) for entry in entries)
    margin = _T * standard_error(theirs - ours) if len(ours) == len(theirs) == GROUPS else None
    return Difference(second["values"][name] - first["values"][name], margin, first["n"])
