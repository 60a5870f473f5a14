"""Sub-grids of the T training steps on which a sampler walks from noise to data.

`uniform` is ours: exactly S unique steps, from T-1 down to clean data (step -1). `compvis` and `compvis_quad` are the
grids of the published samples: c*k + 1, and a quadratic one, whose last move ends at step 0 instead of clean data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import LongTensor

from ldm.errors import UserError


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class TimeGrid:
    """List the steps to visit, descending (S,), and for each the step that it moves to (S,)."""

    steps: LongTensor
    previous: LongTensor

    def __len__(self) -> int:
        return len(self.steps)

    def tail(self, length: int | None) -> TimeGrid:
        """Keep the `length` least noisy steps (all if None). UserError unless 1 <= length <= S."""
        if length is None:
            return self
        if not 1 <= length <= len(self):
            raise UserError(f"sampler: start is {length}; the grid has {len(self)} steps, so use 1 to {len(self)}")
        return TimeGrid(self.steps[-length:], self.previous[-length:])


Spacing = Callable[[int, int], TimeGrid]


def _check(num_steps: int, total: int) -> None:
    if not 1 <= num_steps <= total:
        raise UserError(f"sampler: steps is {num_steps}; the schedule has {total} steps, so use 1 to {total}")


def _grid(ascending: np.ndarray, final: int) -> TimeGrid:
    steps = torch.from_numpy(ascending[::-1].astype(np.int64))
    return TimeGrid(steps, torch.cat([steps[1:], torch.tensor([final])]))


def uniform(num_steps: int, total: int) -> TimeGrid:
    """Spread S unique steps evenly, T-1 included, ending at clean data. UserError unless 1 <= S <= T."""
    _check(num_steps, total)
    k = np.arange(num_steps, dtype=np.int64)
    return _grid((total - 1 - k * total // num_steps)[::-1], final=-1)


def compvis(num_steps: int, total: int) -> TimeGrid:
    """Take c*k + 1 with c = T // S as the published samples did.

    More than S steps come out when S does not divide T. A step T, one too far, becomes T-1. Ends at step 0.
    """
    _check(num_steps, total)
    ascending = np.arange(0, total, total // num_steps) + 1
    return _grid(np.unique(ascending.clip(max=total - 1)), final=0)


def compvis_quad(num_steps: int, total: int) -> TimeGrid:
    """Take floor(linspace(0, sqrt(0.8 T), S)^2) + 1, denser near the data; small steps repeat. Ends at step 0."""
    _check(num_steps, total)
    ascending = (np.linspace(0, np.sqrt(0.8 * total), num_steps) ** 2).astype(np.int64) + 1
    return _grid(ascending.clip(max=total - 1), final=0)


SPACINGS: dict[str, Spacing] = {"uniform": uniform, "compvis": compvis, "compvis_quad": compvis_quad}


def resolve_spacing(spacing: Spacing | str) -> Spacing:
    """Accept a spacing or its name in SPACINGS. UserError for another name."""
    if not isinstance(spacing, str):
        return spacing
    if spacing not in SPACINGS:
        raise UserError(f"sampler: spacing '{spacing}' is unknown; use one of {', '.join(SPACINGS)}")
    return SPACINGS[spacing]
