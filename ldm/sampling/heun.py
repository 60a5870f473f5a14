"""Heun's method on the probability flow (Karras et al., arXiv 2206.00364, algorithm 1), for any process.

With dx = x0 d(alpha) + eps d(sigma), Euler's step predicts the state at the end; the predictions there and here are
averaged. The last step, which ends at clean data, is Euler's. Costs two evaluations of the network a step.
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
class Heun(GridSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws no noise.

    By default a discrete process is walked in even steps of the log signal-to-noise ratio: with even steps of time the
    last one, which is of first order, is too long.
    """

    steps: int = 25
    grid: Grid | str | None = None
    start: int | None = None

    def default_grid(self, process: Process) -> str:
        """Return the grid of the process, for a discrete one that of the log signal-to-noise ratio."""
        return process.grid if process.num_steps is None else "log_snr"

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        for step in intervals:
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            x0, eps = denoise(x, t)
            x0 = hooks.refine(x0)
            ahead = step.move(x0, eps)
            if not step.is_last:
                x0_ahead, eps_ahead = denoise(ahead, times_like(x, step.next_t))
                x0_ahead = hooks.refine(x0_ahead)
                up, down = step.next_alpha - step.alpha, step.next_sigma - step.sigma
                ahead = x + up * (x0 + x0_ahead) / 2 + down * (eps + eps_ahead) / 2
            x = ahead
            yield Step(x, x0, step.t)
