"""Euler steps with new noise: down along the flow and up by noise ("Euler a" of k-diffusion), for any process.

In x / alpha, where noise is sigma / alpha, a step goes down to sqrt(sigma'^2 - s^2) and adds noise of s, the standard
deviation of q(x' | x, x_0): the marginals are those of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ldm.bounds import Fraction
from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.sampling.base import GridSampler, Hooks, Interval, Step, add_noise, times_like


@dataclass(frozen=True)
class EulerAncestral(GridSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; noise is drawn at every step.

    eta: share of the noise, 0 to 1; 0 is Euler's method. UserError for another one.
    """

    steps: int = 50
    grid: Grid | str | None = None
    start: int | None = None
    eta: Fraction = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampler euler_ancestral: eta is {self.eta:g}; use 0 (no noise) to 1")

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        for step in intervals:
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            x0, eps = denoise(x, t)
            x0, std = hooks.refine(x0), self.eta * step.posterior_std
            x = add_noise(step.move(x0, eps, std), std, hooks.noise)
            yield Step(x, x0, step.t)
