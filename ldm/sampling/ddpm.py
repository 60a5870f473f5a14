"""Ancestral sampling: every step of the forward process reversed (DDPM, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.sampling.base import GridSampler, Hooks, Interval, Step, add_noise, last_steps, times_like


@dataclass(frozen=True)
class DDPM(GridSampler):
    """Take all T steps of a discrete process, or the `start` least noisy ones; of another process `steps` of a grid.

    The variance is that of the posterior, which a discrete process may mix with its upper bound, or what a network that
    has learned it says.
    """

    steps: int | None = None
    grid: Grid | str | None = None
    start: int | None = None

    def times(self, process: Process) -> Tensor:
        """Return the times of the walk, float64 (S + 1,). UserError for a continuous process without `steps`."""
        if self.steps is not None:
            return super().times(process)
        if process.num_steps is None:
            raise UserError(f"DDPM: {type(process).__name__} has no steps of its own; give the number of steps")
        return last_steps(torch.arange(process.num_steps - 1, -2, -1, dtype=torch.float64), self.start)

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        for step in intervals:
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            denoised = denoise(x, t)
            x0 = hooks.refine(denoised.x0)
            # the mean of q(x_s | x_t, x_0), eq. 7, for any process
            from_x = step.alpha / step.next_alpha * (step.next_sigma / step.sigma) ** 2
            mean = step.next_alpha * step.added_variance / step.sigma**2 * x0 + from_x * x
            x = add_noise(mean, self._std(step, process, denoised.share), hooks.noise)
            yield Step(x, x0, step.t)

    @staticmethod
    def _std(step: Interval, process: Process, share: Tensor | None) -> Tensor | float:
        """Return the standard deviation of the noise of a step; the last one is the mean alone."""
        if step.is_last:
            return 0.0
        if share is not None:
            smallest, largest = 2 * math.log(step.posterior_std), math.log(step.added_variance)
            return ((smallest + share * (largest - smallest)) / 2).exp()
        weight = process.posterior_weight
        return math.sqrt((1 - weight) * step.posterior_std**2 + weight * step.added_variance)
