"""DPM-Solver++(2M): second-order multistep in the log signal-to-noise ratio (Lu et al., algorithm 2).

With lambda = log(alpha / sigma) and h the step in it: x' = sigma'/sigma x - alpha' (e^-h - 1) D, where D extrapolates
x0 linearly from the previous step. The first and the last step are of first order; a last step to clean data, where
lambda is infinite, returns x0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grids import Spacing, TimeGrid, uniform
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Schedule
from ldm.sampling.base import GridSampler, Hooks, Step, steps_like
from ldm.sampling.ddim import coefficients_of


def _lambda(abar: float) -> float:
    """Return log(alpha / sigma); infinite for clean data."""
    return math.inf if abar == 1 else 0.5 * (math.log(abar) - math.log1p(-abar))


@dataclass(frozen=True)
class DPMSolver(GridSampler):
    """Walk `steps` steps of the grid `spacing`, or only the `start` least noisy of them; draws no noise."""

    steps: int = 20
    spacing: Spacing | str = uniform
    start: int | None = None

    def _walk(self, denoise: Denoise, x: Tensor, schedule: Schedule, grid: TimeGrid, hooks: Hooks) -> Iterator[Step]:
        table = coefficients_of(grid, schedule, eta=0.0)
        columns = (grid.steps, table.alphas.flip(0), table.alphas_prev.flip(0))
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        earlier: Tensor | None = None
        h_earlier = 0.0
        for i, (step, abar, abar_prev) in enumerate(rows):
            t = steps_like(x, step)
            x = hooks.constrain(x, t)
            x0 = hooks.refine(denoise(x, t).x0)
            h = _lambda(abar_prev) - _lambda(abar)
            data = x0
            if earlier is not None and i < len(rows) - 1:
                data = x0 + h / (2 * h_earlier) * (x0 - earlier)
            decay = math.exp(-h)  # 0 at clean data
            x = ((1 - abar_prev) / (1 - abar)) ** 0.5 * x + abar_prev**0.5 * (1 - decay) * data
            if h > 0:  # a repeated step of a foreign grid carries no slope
                earlier, h_earlier = x0, h
            yield Step(x, x0, step)
