"""The samples of one step of the optimiser, and the learning rate for so many."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import ConfigError

_log = logging.getLogger(__name__)
_LARGE_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class GlobalBatch:
    """Samples of one optimiser step."""

    per_device: int
    devices: int
    nodes: int
    accumulate: int

    @property
    def processes(self) -> int:
        """Return the number of processes, one a device."""
        return self.devices * self.nodes

    @property
    def total(self) -> int:
        """Return the product."""
        return self.per_device * self.processes * self.accumulate

    def __str__(self) -> str:
        return (
            f"{self.total} = {self.per_device} per device x {self.devices} devices x {self.nodes} nodes "
            f"x {self.accumulate} accumulated"
        )


def learning_rate(training: Mapping[str, Any], global_batch: int, scale: bool | None) -> float:
    """Return the learning rate of a step over `global_batch` samples.

    `training.learning_rate` is absolute; `training.global_batch` names the batch that it was chosen for, and `scale`
    True scales it in proportion. `training.base_learning_rate` (CompVis configs) is per sample unless `scale` is False.
    """
    absolute, base = training.get("learning_rate"), training.get("base_learning_rate")
    if (absolute is None) == (base is None):
        given = "neither is" if base is None else "both are"
        raise ConfigError(f"{given} given; write one of learning_rate (absolute) and base_learning_rate", "training")
    value = absolute if base is None else base
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        name = "learning_rate" if base is None else "base_learning_rate"
        hint = "(YAML reads 1e-4 as text; write 1.0e-4)"
        raise ConfigError(f"{value!r} is no positive number {hint}", f"training.{name}")
    if base is not None:
        return _per_sample(float(base), global_batch, scale)
    chosen_for = training.get("global_batch")
    if chosen_for is not None and (type(chosen_for) is not int or chosen_for < 1):
        raise ConfigError(f"{chosen_for!r} is no whole number, 1 or more", "training.global_batch")
    if chosen_for is None or chosen_for == global_batch:
        return float(absolute)
    if scale:
        return float(absolute) * global_batch / chosen_for
    _log.warning(
        "the learning rate %g was chosen for a global batch of %d, this run has %d; it is kept "
        "(--scale_lr scales it in proportion)",
        absolute,
        chosen_for,
        global_batch,
    )
    return float(absolute)


def _per_sample(base: float, global_batch: int, scale: bool | None) -> float:
    if scale is False:
        return base
    scaled = base * global_batch
    if scaled > _LARGE_LEARNING_RATE:
        _log.warning(
            "the learning rate is %g = base_learning_rate %g x global batch %d, which is unusually large; if the "
            "config means %g for a step (as the published one for churches does), give --scale_lr false",
            scaled,
            base,
            global_batch,
            base,
        )
    return scaled
