"""Learning-rate multipliers as functions of the optimiser step n (counted from 0).

Each is called with a step and returns the factor by which the learning rate is multiplied. Warm-up is linear from
`start` to `max`; then either half a cosine, min + (max - min) (1 + cos(pi t)) / 2, or a straight line down to `min`.
The cyclic ones take one entry per cycle; after the last cycle they stay at its end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

from ldm.bounds import Count, Natural, NonNegative
from ldm.errors import UserError


@dataclass(frozen=True)
class WarmUpCosine:
    """Warm up linearly, then decay by half a cosine until step `max_decay_steps` and stay there."""

    warm_up_steps: Natural
    lr_min: NonNegative
    lr_max: NonNegative
    lr_start: NonNegative
    max_decay_steps: Count

    def __call__(self, step: int) -> float:
        """Return the multiplier at a step >= 0."""
        if step < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) / self.warm_up_steps * step
        decay_steps = max(self.max_decay_steps - self.warm_up_steps, 1)
        progress = min((step - self.warm_up_steps) / decay_steps, 1.0)
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class _Cycles:
    """Settings of each cycle: sequences with one entry per cycle, or plain numbers for a single cycle."""

    warm_up_steps: Sequence[Natural] | Natural
    f_min: Sequence[NonNegative] | NonNegative
    f_max: Sequence[NonNegative] | NonNegative
    f_start: Sequence[NonNegative] | NonNegative
    cycle_lengths: Sequence[Count] | Count

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, Sequence) else (value,))
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) != 1:
            raise UserError(f"{type(self).__name__}: every list needs one entry per cycle, got {lengths}")

    def __call__(self, step: int) -> float:
        """Return the multiplier at a step >= 0."""
        ends = list(accumulate(self.cycle_lengths))
        cycle = next((index for index, end in enumerate(ends) if step <= end), len(ends) - 1)
        step = min(step, ends[-1]) - (ends[cycle] - self.cycle_lengths[cycle])
        warm_up, start, top = self.warm_up_steps[cycle], self.f_start[cycle], self.f_max[cycle]
        if step < warm_up:
            return start + (top - start) / warm_up * step
        return self._decay(cycle, step)

    def _decay(self, cycle: int, step: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class WarmUpCosineCycles(_Cycles):
    """Warm up and decay by half a cosine in each cycle."""

    def _decay(self, cycle: int, step: int) -> float:
        warm_up = self.warm_up_steps[cycle]
        progress = min((step - warm_up) / max(self.cycle_lengths[cycle] - warm_up, 1), 1.0)
        low, top = self.f_min[cycle], self.f_max[cycle]
        return low + 0.5 * (top - low) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmUpLinear(_Cycles):
    """Warm up and fall on a straight line in each cycle; f_min = f_max = 1 is a plain warm-up."""

    def _decay(self, cycle: int, step: int) -> float:
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * (length - step) / length
