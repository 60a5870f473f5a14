"""Multistep consistency sampling: to clean data and back to less noise (Song et al., arXiv 2303.01469, algorithm 1).

x' = alpha' x0 + sigma' z. For networks that were distilled or trained so that x0 is the end of the flow through x; any
other network gives the mean of the data, and samples that are too smooth.
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
class Consistency(GridSampler):
    """Take `steps` steps of a grid, or only the `start` least noisy of them; the last one draws no noise."""

    steps: int = 4
    grid: Grid | str | None = None
    start: int | None = None

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        for step in intervals:
            t = times_like(x, step.t)
            x = hooks.constrain(x, t)
            x0 = hooks.refine(denoise(x, t).x0)
            x = step.next_alpha * x0
            if not step.is_last:
                x = x + step.next_sigma * hooks.noise(tuple(x.shape))
            yield Step(x, x0, step.t)
