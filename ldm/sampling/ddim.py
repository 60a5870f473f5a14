"""Denoising diffusion implicit models (Song, Meng & Ermon, eq. 12 and 16).

x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z with s = eta std(q(x' | x, x0)): eta = 0 is the deterministic walk,
eta = 1 ancestral sampling on the grid. Written for any process; alpha^2 + sigma^2 need not be 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.sampling.base import GridSampler, Hooks, Interval, Step, add_noise, times_like


@dataclass(frozen=True)
class DDIM(GridSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them.

    Noise is drawn at every step, also for eta = 0 and at the last one, so that the stream of random numbers is the same
    whatever eta is.
    """

    steps: int = 50
    eta: float = 0.0
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
            std = self.eta * step.posterior_std
            x = add_noise(step.move(x0, eps, std), std, hooks.noise)
            yield Step(x, x0, step.t)
