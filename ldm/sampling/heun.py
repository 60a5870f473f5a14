"""Heun's method on the probability flow (Karras et al., arXiv 2206.00364, algorithms 1 and 2), for any process.

With dx = x0 d(alpha) + eps d(sigma), Euler's step predicts the state at the end; the predictions there and here are
averaged. The last step, which ends at clean data, is Euler's. Costs two evaluations of the network a step. With churn,
each step first goes back to more noise, sigma / alpha (1 + gamma), by adding new noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.bounds import NonNegative
from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process, float64_levels
from ldm.errors import UserError
from ldm.sampling.base import GridSampler, Hooks, Interval, Step, times_like


@dataclass(frozen=True)
class Heun(GridSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws no noise without churn.

    s_churn: amount of new noise in the whole walk; s_tmin, s_tmax: between which sigma / alpha it is added; s_noise:
    its standard deviation (EDM, algorithm 2 and table 5). UserError for a negative one, or if s_tmin is above s_tmax.
    By default a discrete process is walked on the logistic grid: with even steps of time the last one, which is of
    first order, is too long.
    """

    steps: int = 25
    grid: Grid | str | None = None
    start: int | None = None
    s_churn: NonNegative = 0.0
    s_tmin: NonNegative = 0.0
    s_tmax: NonNegative = math.inf
    s_noise: NonNegative = 1.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"sampler heun: {name} is {getattr(self, name)}; use 0 or more")
        if not self.s_tmax >= self.s_tmin:
            raise UserError(f"sampler heun: s_tmax is {self.s_tmax}, below s_tmin {self.s_tmin}; exchange them")

    def default_grid(self, process: Process) -> str:
        """Return the grid of the process, for a discrete one the logistic grid."""
        return process.grid if process.num_steps is None else "logistic"

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        for step in intervals:
            start = step.t
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            if (back := self._back(step, process, len(intervals))) is not None:
                noise = self.s_noise * math.sqrt(back.added_variance) * hooks.noise(tuple(x.shape))
                x, t = back.alpha / step.alpha * x + noise, times_like(x, back.t)
                step = step._replace(t=back.t, alpha=back.alpha, sigma=back.sigma)
            x0, eps = denoise(x, t)
            x0 = hooks.refine(x0)
            ahead = step.move(x0, eps)
            if not step.is_last:
                x0_ahead, eps_ahead = denoise(ahead, times_like(x, step.next_t))
                x0_ahead = hooks.refine(x0_ahead)
                up, down = step.next_alpha - step.alpha, step.next_sigma - step.sigma
                ahead = x + up * (x0 + x0_ahead) / 2 + down * (eps + eps_ahead) / 2
            x = ahead
            yield Step(x, x0, start)

    def _back(self, step: Interval, process: Process, steps: int) -> Interval | None:
        """Return the step from where churn leads to the start of a step; None where it adds nothing."""
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        if gamma == 0 or step.alpha == 0 or not self.s_tmin <= step.sigma / step.alpha <= self.s_tmax:
            return None
        log_snr = -2 * math.log((1 + gamma) * step.sigma / step.alpha)
        time = process.from_log_snr(torch.tensor([log_snr], dtype=torch.float64))  # the noisiest where it is beyond
        (alpha,), (sigma,) = float64_levels(process, time)
        return Interval(time.item(), alpha, sigma, *step[:3]) if time.item() > step.t else None
