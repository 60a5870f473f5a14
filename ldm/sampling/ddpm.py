"""Ancestral sampling: every step of the forward process reversed (DDPM, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Schedule
from ldm.errors import UserError
from ldm.sampling.base import Constrain, Noise, Refine, Step, gaussian_noise, identity, identity_constrain, steps_like


@dataclass(frozen=True)
class DDPM:
    """Take all T steps, or the `start` least noisy ones, with the posterior variance of the schedule."""

    start: int | None = None

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        *,
        refine: Refine = identity,
        constrain: Constrain = identity_constrain,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Yield one Step per step; `constrain` acts after each step, at the level that was left."""
        total = schedule.num_steps
        start = total if self.start is None else self.start
        if not 1 <= start <= total:
            raise UserError(f"DDPM: start is {start}; the schedule has {total} steps, so use 1 to {total}")
        return self._walk(denoise, x, schedule, start, refine, constrain, noise or gaussian_noise(x))

    def _walk(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        start: int,
        refine: Refine,
        constrain: Constrain,
        noise: Noise,
    ) -> Iterator[Step]:
        for step in reversed(range(start)):
            t = steps_like(x, step)
            x, x0 = ancestral_step(denoise, x, t, schedule, refine, noise(tuple(x.shape)))
            x = constrain(x, t)
            yield Step(x, x0, step)


def ancestral_step(
    denoise: Denoise, x: Tensor, t: Tensor, schedule: Schedule, refine: Refine, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw x_{t-1} from q(x_{t-1} | x_t, x0 predicted); returns it and x0. Sample i is at its own step t[i] (B,)."""
    x0 = refine(denoise(x, t).x0)
    mean, _, log_variance = schedule.posterior(x0, x, t)
    std = torch.exp(0.5 * log_variance).masked_fill((t == 0)[:, None, None, None], 0.0)  # the last step is its mean
    return mean + std * noise, x0
