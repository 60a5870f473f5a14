"""DPM-Solver++ of orders 1 to 3, multistep in the log signal-to-noise ratio (Lu et al., arXiv 2211.01095, algorithm 2).

With lambda = log(alpha / sigma) and h the step in it, x' = sigma'/sigma x + alpha' (1 - e^-h) D, where D extrapolates
x0 from the steps before. Where lambda is infinite, at clean data and from noise alone, D is x0, and the order rises
from 1 at the start. The published third order takes half of the second derivative, which makes it one of order 2 with a
smaller error; `exact` takes all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.sampling.base import (
    History,
    Hooks,
    Interval,
    MultistepSampler,
    Step,
    add_noise,
    times_like,
)

_FEW_STEPS = 15  # with fewer the order also falls at the end, as published


@dataclass(frozen=True)
class DPMSolver(MultistepSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws no noise.

    By default the steps are those of the logistic grid, on which the method keeps its order. order: 1 to 3 and at
    most the number of steps; None is 2, or 1 for a single step. exact: whether order 3 is that of Taylor's series.
    """

    steps: int = 20
    grid: Grid | str | None = None
    start: int | None = None
    order: int | None = None
    exact: bool = False

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        return multistep(denoise, x, intervals, hooks, self.order or 2, bend=1.0 if self.exact else 0.5)


def multistep(
    denoise: Denoise, x: Tensor, intervals: list[Interval], hooks: Hooks, order: int, bend: float, rate: int = 1
) -> Iterator[Step]:
    """Walk the probability flow (rate 1), or the stochastic differential equation with the same marginals (rate 2).

    rate: at which x is forgotten, in lambda; bend: share of the second derivative of x0 that order 3 takes.
    """
    known = History()
    for i, step in enumerate(intervals):
        t = times_like(x, step.t)
        x = hooks.constrain(x, t)
        x0 = hooks.refine(denoise(x, t).x0)
        known.add(step, x0)
        left = len(intervals) - i if len(intervals) < _FEW_STEPS else order
        data = _integral(known, step.h, rate, min(order, left), bend)
        kept = math.exp(-step.h) if rate == 2 else 1.0
        x = step.next_sigma / step.sigma * kept * x + step.next_alpha * data
        if rate == 2:
            x = add_noise(x, step.next_sigma * math.sqrt(-math.expm1(-2 * step.h)), hooks.noise)
        yield Step(x, x0, step.t)


def _integral(known: History, h: float, rate: int, order: int, bend: float) -> Tensor:
    """Integrate rate e^(-rate (h - u)) x0(u) over u in [0, h], with x0 a polynomial through the newest known ones."""
    order, newest = known.order(h, order), known.data[0]
    total = rate * h
    whole = -math.expm1(-total)
    if order == 1:
        return whole * newest
    slope = (newest - known.data[1]) * (h / known.distance(0, 1))
    if order == 2:
        return whole * (newest + slope / 2)  # the midpoint rule, as published
    earlier = (known.data[1] - known.data[2]) * (h / known.distance(1, 2))
    half = (slope - earlier) * (h / known.distance(0, 2))  # of the second derivative
    slope = slope + half * (known.distance(0, 1) / h)
    curved = 2 * bend * ((whole - total) / total**2 + 1 / 2)
    return whole * newest + (1 - whole / total) * slope + curved * half
