"""UniPC: a predictor and a corrector of one form in the log signal-to-noise ratio (Zhao et al., arXiv 2302.04867).

With lambda = log(alpha / sigma) and h the step in it, x' = sigma'/sigma x + alpha' (1 - e^-h) (m_0 + sum_k rho_k D_k),
D_k = (m_k - m_0) / r_k, m_k the x0 of earlier steps at lambda + r_k h (algorithms 5 to 8, B_2(h) = e^h - 1 for data
prediction). The corrector repeats the step with the x0 found at its end, which the next step needs anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.sampling.base import History, Hooks, Interval, MultistepSampler, Step, times_like


@dataclass(frozen=True)
class UniPC(MultistepSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws no noise.

    By default the steps are those of the logistic grid. order: of the predictor, 1 to 3 and at most the
    number of steps; the corrector's is one more. None is 2, or 1 for a single step.
    """

    steps: int = 20
    grid: Grid | str | None = None
    start: int | None = None
    order: int | None = None

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        known, order, before, start = History(), 1, None, x
        for i, step in enumerate(intervals):
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            x0 = hooks.refine(denoise(x, t).x0)
            if before is not None and 0 < before.h < math.inf:
                x = _moved(before, start, known, order, ahead=x0)
            known.add(step, x0)
            # a last step to clean data is of first order, and the order falls towards it
            left = len(intervals) - i if intervals[-1].is_last else math.inf
            order = known.order(step.h, min(self.order or 2, left))
            before, start = step, x
            x = _moved(step, x, known, order)
            yield Step(x, x0, step.t)


def _moved(step: Interval, x: Tensor, known: History, order: int, ahead: Tensor | None = None) -> Tensor:
    """Return the state at the end of a step: predicted, or corrected by the x0 there."""
    newest = known.data[0]
    points = [(-known.distance(0, k) / step.h, known.data[k]) for k in range(1, order)]
    points += [] if ahead is None else [(1.0, ahead)]
    data = newest
    for weight, (r, x0) in zip(_weights(step.h, [r for r, _ in points]), points, strict=True):
        data = data + weight / r * (x0 - newest)
    return step.next_sigma / step.sigma * x - step.next_alpha * math.expm1(-step.h) * data


def _weights(h: float, places: list[float]) -> list[float]:
    """Return rho (n,): sum_k rho_k r_k^j = j! h phi_(j+1)(h) / B(h) for j = 1 .. n; of one place 1/2, as published."""
    if len(places) < 2:
        return [0.5] * len(places)
    b, phi, factorial = [], math.expm1(-h) / -h - 1, 1
    for j in range(1, len(places) + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= j + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve(np.vander(places, increasing=True).T, np.array(b)).tolist()
