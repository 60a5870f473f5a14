"""SDE-DPM-Solver++: the multistep solver of orders 1 to 3 for the stochastic differential equation of the process.

Lu et al., arXiv 2211.01095, section 4.3: as DPM-Solver++, but x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D +
sigma' sqrt(1 - e^-2h) z. Order 1 is ancestral sampling. New noise corrects errors of earlier steps, so that of many
steps it draws better samples than the flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grids import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.sampling.base import Hooks, Interval, MultistepSampler, Step
from ldm.sampling.dpm_solver import multistep


@dataclass(frozen=True)
class SDEDPMSolver(MultistepSampler):
    """Walk `steps` steps of a grid, or only the `start` least noisy of them; draws noise at every step.

    By default the steps are those of the logistic grid. order: 1 to 3 and at most the number of steps; None
    is 2, or 1 for a single step.
    """

    steps: int = 20
    grid: Grid | str | None = None
    start: int | None = None
    order: int | None = None

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        return multistep(denoise, x, intervals, hooks, self.order or 2, bend=1.0, rate=2)
