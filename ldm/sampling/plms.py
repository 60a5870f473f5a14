"""Pseudo linear multi-step sampling (Liu et al., "Pseudo Numerical Methods for Diffusion Models", eq. 9, 11-12).

Adams-Bashforth combinations of the last four eps replace eps in the deterministic DDIM step; the first step averages
eps at both ends, which costs one more evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grids import Spacing, TimeGrid, uniform
from ldm.diffusion.prediction import Denoise, epsilon_to_x0
from ldm.diffusion.process import Schedule
from ldm.sampling.base import GridSampler, Hooks, Step, steps_like
from ldm.sampling.ddim import coefficients_of, ddim_step

# newest first, one row per number of known eps
_ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _combine(newest_first: Sequence[Tensor]) -> Tensor:
    weights = _ADAMS_BASHFORTH[len(newest_first)]
    return sum(weight * eps for weight, eps in zip(weights, newest_first, strict=True))


@dataclass(frozen=True)
class PLMS(GridSampler):
    """Walk `steps` steps of the grid `spacing`, or only the `start` least noisy of them; draws no noise."""

    steps: int = 50
    spacing: Spacing | str = uniform
    start: int | None = None

    def _walk(self, denoise: Denoise, x: Tensor, schedule: Schedule, grid: TimeGrid, hooks: Hooks) -> Iterator[Step]:
        steps = grid.steps.tolist()
        alphas_prev = coefficients_of(grid, schedule, eta=0.0).alphas_prev.flip(0).tolist()
        known: list[Tensor] = []  # eps of earlier steps, newest first
        for i, (step, alpha_prev) in enumerate(zip(steps, alphas_prev, strict=True)):
            t = steps_like(x, step)
            x = hooks.constrain(x, t)
            x0, eps = denoise(x, t)
            known = [eps, *known[:3]]
            if len(known) > 1:
                eps = _combine(known)
                x0 = epsilon_to_x0(schedule, eps, x, t)
            elif alpha_prev < 1:  # at clean data there is no eps to average with
                ahead = ddim_step(hooks.refine(x0), eps, 0.0, alpha_prev, 0.0)
                t_ahead = steps_like(x, steps[min(i + 1, len(steps) - 1)])
                eps = (eps + denoise(ahead, t_ahead).eps) / 2
                x0 = epsilon_to_x0(schedule, eps, x, t)
            x0 = hooks.refine(x0)
            x = ddim_step(x0, eps, 0.0, alpha_prev, 0.0)
            yield Step(x, x0, step)
