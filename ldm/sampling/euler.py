"""Euler's method on the probability flow, along the path of the process (Karras et al., arXiv 2206.00364, section 3).

With dx = x0 d(alpha) + eps d(sigma), a step of first order keeps x0 and eps: x' = alpha' x0 + sigma' eps. For rectified
flow this is x + (t' - t) v, for EDM x + (sigma' - sigma) (x - D) / sigma; for every process it is DDIM without noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.sampling.base import GridSampler, Hooks, Interval, Step, times_like


@dataclass(frozen=True)
class Euler(GridSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws no noise."""

    steps: int = 50
    grid: Grid | str | None = None
    start: int | None = None

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        for step in intervals:
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            x0, eps = denoise(x, t)
            x0 = hooks.refine(x0)
            x = step.move(x0, eps)
            yield Step(x, x0, step.t)
