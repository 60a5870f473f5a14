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

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.sampling.base import GridSampler, Hooks, Interval, Step, times_like


def _lambda(alpha: float, sigma: float) -> float:
    """Return log(alpha / sigma): infinite for clean data, minus infinite for noise alone."""
    if sigma == 0:
        return math.inf
    return -math.inf if alpha == 0 else math.log(alpha / sigma)


@dataclass(frozen=True)
class DPMSolver(GridSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws no noise.

    By default the steps are even in the log signal-to-noise ratio, where the method has its order.
    """

    steps: int = 20
    grid: Grid | str | None = None
    start: int | None = None

    def default_grid(self, process: Process) -> str:
        """Return the grid of even steps of the log signal-to-noise ratio."""
        return "log_snr"

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        earlier: Tensor | None = None
        h_earlier = 0.0
        for i, step in enumerate(intervals):
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            x0, _ = denoise(x, t)
            x0 = hooks.refine(x0)
            h = _lambda(step.next_alpha, step.next_sigma) - _lambda(step.alpha, step.sigma)
            data = x0
            if earlier is not None and i < len(intervals) - 1:
                data = x0 + h / (2 * h_earlier) * (x0 - earlier)
            decay = math.exp(-h)  # 0 at clean data, and from noise alone
            x = step.next_sigma / step.sigma * x + step.next_alpha * (1 - decay) * data
            if 0 < h < math.inf:  # a repeated step of a foreign grid, or one from noise alone, carries no slope
                earlier, h_earlier = x0, h
            yield Step(x, x0, step.t)
