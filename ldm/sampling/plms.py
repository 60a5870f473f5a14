"""Pseudo linear multi-step sampling (Liu et al., "Pseudo Numerical Methods for Diffusion Models", eq. 9, 11-12).

Adams-Bashforth combinations of the last four eps replace eps in the deterministic DDIM step; the first step averages
eps at both ends, which costs one more evaluation. An error of the combined eps reaches x' multiplied by
|sigma' - alpha' sigma / alpha|; a step from hardly any signal, where that is large, is therefore DDIM's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.sampling.base import GridSampler, Hooks, Interval, Step, times_like

# newest first, one row per number of known eps
_ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_LARGEST_AMPLIFICATION = 10.0


def _combine(newest_first: Sequence[Tensor]) -> Tensor:
    weights = _ADAMS_BASHFORTH[len(newest_first)]
    return sum(weight * eps for weight, eps in zip(weights, newest_first, strict=True))


def _amplification(step: Interval) -> float:
    """Return how much of an error of eps reaches the next state, as a multiple of the size of that state."""
    if step.alpha == 0:
        return math.inf
    error = abs(step.next_sigma - step.next_alpha * step.sigma / step.alpha)
    return error / math.hypot(step.next_alpha, step.next_sigma)


@dataclass(frozen=True)
class PLMS(GridSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws no noise.

    By default the steps are those of the logistic grid, on which the method is of second order.
    """

    steps: int = 50
    grid: Grid | str | None = None
    start: int | None = None

    def default_grid(self, process: Process) -> str:
        """Return the logistic grid."""
        return "logistic"

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        known: list[Tensor] = []  # eps of earlier steps, newest first
        for step in intervals:
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            x0, eps = denoise(x, t)
            known = [eps, *known[:3]]
            if _amplification(step) <= _LARGEST_AMPLIFICATION:
                if len(known) > 1:
                    eps = _combine(known)
                elif not step.is_last:  # at clean data there is no eps to average with
                    ahead = step.move(hooks.refine(x0), eps)
                    t_ahead = step.t if step is intervals[-1] else step.next_t  # as published for a single step
                    eps = (eps + denoise(ahead, times_like(x, t_ahead)).eps) / 2
                x0 = (x - step.sigma * eps) / step.alpha
            x0 = hooks.refine(x0)
            x = step.move(x0, eps)
            yield Step(x, x0, step.t)
