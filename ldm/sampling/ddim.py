"""Denoising diffusion implicit models (Song, Meng & Ermon, eq. 12 and 16).

x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z with s = eta sqrt(sigma'^2 / sigma^2 (1 - alpha^2 / alpha'^2)): eta = 0
is the deterministic walk, eta = 1 ancestral sampling on the sub-grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.grids import Spacing, TimeGrid, uniform
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Schedule
from ldm.sampling.base import GridSampler, Hooks, Step, steps_like


class Coefficients(NamedTuple):
    """Tabulate a walk, ascending in time, float64 (S,): steps (int64), abar, abar of the step moved to, s, sigma."""

    timesteps: Tensor
    alphas: Tensor
    alphas_prev: Tensor
    sigmas: Tensor
    sqrt_one_minus_alphas: Tensor


def coefficients_of(grid: TimeGrid, schedule: Schedule, eta: float) -> Coefficients:
    """Compute the numbers of a DDIM walk on `grid`."""
    abar = schedule.alphas_cumprod.detach().cpu().double()
    steps, previous = grid.steps.flip(0), grid.previous.flip(0)
    alphas = abar[steps]
    alphas_prev = torch.where(previous < 0, torch.ones_like(alphas), abar[previous.clamp(min=0)])
    sigmas = eta * torch.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    return Coefficients(steps, alphas, alphas_prev, sigmas, torch.sqrt(1 - alphas))


def ddim_step(x0: Tensor, eps: Tensor, noise: Tensor | float, alpha_prev: float, sigma: float) -> Tensor:
    """Move to the level whose abar is `alpha_prev`, adding noise of standard deviation `sigma`."""
    direction = max(1 - alpha_prev - sigma**2, 0.0) ** 0.5  # rounding may leave a tiny negative number
    return alpha_prev**0.5 * x0 + direction * eps + sigma * noise


@dataclass(frozen=True)
class DDIM(GridSampler):
    """Walk `steps` steps of the grid `spacing`, or only the `start` least noisy of them.

    `spacing` is a function (S, T) -> TimeGrid or its name in SPACINGS. Noise is drawn at every step, also for eta = 0
    and at the last one, so that the stream of random numbers is the same whatever eta is.
    """

    steps: int = 50
    eta: float = 0.0
    spacing: Spacing | str = uniform
    start: int | None = None

    def coefficients(self, schedule: Schedule) -> Coefficients:
        """Tabulate the walk, ascending in time, in float64."""
        return coefficients_of(self.grid(schedule), schedule, self.eta)

    def _walk(self, denoise: Denoise, x: Tensor, schedule: Schedule, grid: TimeGrid, hooks: Hooks) -> Iterator[Step]:
        table = coefficients_of(grid, schedule, self.eta)
        rows = zip(table.timesteps.tolist(), table.alphas_prev.tolist(), table.sigmas.tolist(), strict=True)
        for step, alpha_prev, sigma in reversed(list(rows)):
            t = steps_like(x, step)
            x = hooks.constrain(x, t)
            x0, eps = denoise(x, t)
            x0 = hooks.refine(x0)
            x = ddim_step(x0, eps, hooks.noise(tuple(x.shape)), alpha_prev, sigma)
            yield Step(x, x0, step)
