"""Grids of times on which a sampler walks from noise to data: S + 1 times, float64, the noisiest first.

The network is evaluated at all but the last time, which is where the last step ends: clean data, or (end =
"cleanest") the least noisy level that the network knows. `Uniform`, `LogSNR`, `Logistic` and `Karras` are for every
process; `Trailing`, `Leading` and `Linspace` are the grids of diffusers; `Compvis` and `CompvisQuad` are those of the
published samples, whose last step ends at step 0 instead of clean data.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.errors import UserError

End = Literal["clean", "cleanest"]


class Grid(Protocol):
    """Choose the times of a sampler."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,), falling. UserError for a number of steps that the process does not have."""


@dataclass(frozen=True)
class Uniform:
    """Even steps of time; of a discrete process S different steps, the last one included."""

    end: End = "clean"

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,)."""
        _check_steps(process, steps)
        if (total := process.num_steps) is None:
            times = torch.linspace(process.noisiest, process.clean, steps + 1, dtype=torch.float64)
            return _closed(times[:-1], process, self.end)
        k = torch.arange(steps)
        return _closed((total - 1 - k * total // steps).double(), process, self.end)


@dataclass(frozen=True)
class LogSNR:
    """Even steps of the log signal-to-noise ratio, on which multistep solvers have their order (Lu et al. 2022)."""

    end: End = "clean"

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,), between the steps of a discrete process."""
        _check_steps(process, steps)
        low, high = _log_snr_range(process)
        times = process.from_log_snr(torch.linspace(low, high, max(steps, 2), dtype=torch.float64)[:steps])
        times[0] = process.noisiest
        return _closed(times, process, self.end)


@dataclass(frozen=True)
class Logistic:
    """Even steps of 1 / (1 + exp(-log SNR / width)): small ones where signal and noise are alike, large ones beyond.

    With width 2 they are even steps of time in a rectified flow. With width 2k the noise before the last step shrinks
    with the k-th power of their number, so that a solver of order k keeps it, while few steps are not spent where
    nothing happens.
    """

    width: float = 4.0
    end: End = "clean"

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,), between the steps of a discrete process."""
        _check_steps(process, steps)
        ends = process.level(torch.tensor([process.noisiest, process.cleanest], dtype=torch.float64)).log_snr.flatten()
        first, cleanest = torch.sigmoid(ends / self.width).tolist()
        last = min(1 - (1 - first) / steps, cleanest)  # from where the last step leads to clean data, at 1
        places = torch.linspace(first, last, max(steps, 2), dtype=torch.float64)[:steps]
        times = process.from_log_snr(self.width * places[1:].logit())
        times = torch.cat([times.new_tensor([process.noisiest]), times])
        return _closed(times, process, self.end)


@dataclass(frozen=True)
class Karras:
    """Even steps of (sigma / alpha)^(1 / rho) (Karras et al., arXiv 2206.00364, eq. 5)."""

    rho: float = 7.0
    end: End = "clean"

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,), between the steps of a discrete process."""
        _check_steps(process, steps)
        low, high = _log_snr_range(process)
        largest, smallest = (math.exp(-log_snr / 2 / self.rho) for log_snr in (low, high))
        root = torch.linspace(largest, smallest, max(steps, 2), dtype=torch.float64)[:steps]
        times = process.from_log_snr(-2 * self.rho * root.log())
        times[0] = process.noisiest
        return _closed(times, process, self.end)


@dataclass(frozen=True)
class Trailing:
    """Whole steps T - 1, T - 1 - T / S, ... rounded: diffusers' "trailing" (Lin et al., arXiv 2305.08891, table 2)."""

    end: End = "clean"

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,) of a discrete process."""
        total = _check_discrete(process, steps, "trailing")
        return _closed(torch.from_numpy(np.round(np.arange(total, 0, -total / steps))[:steps] - 1), process, self.end)


@dataclass(frozen=True)
class Leading:
    """Whole steps k (T // S) + offset: diffusers' "leading", which leaves out the noisiest and ends at "cleanest"."""

    offset: int = 0
    end: End = "cleanest"

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,) of a discrete process."""
        total = _check_discrete(process, steps, "leading")
        times = np.arange(steps)[::-1] * (total // steps) + self.offset
        return _closed(torch.from_numpy(times.clip(0, total - 1).astype(np.float64)), process, self.end)


@dataclass(frozen=True)
class Linspace:
    """Even steps from the noisiest to the cleanest time, rounded to whole steps: diffusers' "linspace"."""

    end: End = "clean"

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,)."""
        _check_steps(process, steps)
        times = np.linspace(process.cleanest, process.noisiest, steps)[::-1].copy()
        return _closed(torch.from_numpy(times if process.num_steps is None else times.round()), process, self.end)


@dataclass(frozen=True)
class Compvis:
    """The steps c k + 1 with c = T // S of the published samples, ending at step 0.

    More than S steps come out when S does not divide T. A step T, one too far, becomes T - 1.
    """

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (at least S + 1,) of a discrete process."""
        total = _check_discrete(process, steps, "compvis")
        ascending = np.arange(0, total, total // steps) + 1
        return _published(np.unique(ascending.clip(max=total - 1)))


@dataclass(frozen=True)
class CompvisQuad:
    """The published quadratic grid floor(linspace(0, sqrt(0.8 T), S)^2) + 1, denser near the data; ends at step 0."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return times (S + 1,) of a discrete process; small steps repeat."""
        total = _check_discrete(process, steps, "compvis_quad")
        ascending = (np.linspace(0, np.sqrt(0.8 * total), steps) ** 2).astype(np.int64) + 1
        return _published(ascending.clip(max=total - 1))


def grid_names() -> list[str]:
    """Return the names of all grids, those of the classes of this file in lower case: uniform, log_snr, ..."""
    return list(_classes())


def resolve_grid(grid: Grid | str) -> Grid:
    """Return a grid by its name, or the grid itself. UserError for a name that does not exist."""
    if not isinstance(grid, str):
        return grid
    classes = _classes()
    if grid not in classes:
        raise UserError(f"sampler: grid '{grid}' is unknown; use one of {', '.join(classes)}")
    return classes[grid]()


def _classes() -> dict[str, type]:
    """Return the grids of this file by their names, in the order of their definition."""
    members = [value for value in globals().values() if isinstance(value, type) and value.__module__ == __name__]
    return {_snake(cls.__name__): cls for cls in members if cls is not Grid}


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _check_steps(process: Process, steps: int) -> None:
    total = process.num_steps
    if steps < 1 or (total is not None and steps > total):
        allowed = "1 or more" if total is None else f"1 to {total}, as the process has {total} steps"
        raise UserError(f"sampler: steps is {steps}; use {allowed}")


def _check_discrete(process: Process, steps: int, name: str) -> int:
    if process.num_steps is None:
        kind = type(process).__name__
        raise UserError(f"sampler: grid {name} counts whole steps, and {kind} has none; use uniform or logistic")
    _check_steps(process, steps)
    return process.num_steps


def _log_snr_range(process: Process) -> tuple[float, float]:
    """Return the log SNR of the noisiest and of the cleanest time; where there is no signal, the mirrored one."""
    ends = process.level(torch.tensor([process.noisiest, process.cleanest], dtype=torch.float64))
    low, high = ends.log_snr.flatten().tolist()
    return (low if math.isfinite(low) else -high), high


def _closed(times: Tensor, process: Process, end: End) -> Tensor:
    return torch.cat([times, times.new_tensor([process.clean if end == "clean" else process.cleanest])])


def _published(ascending: np.ndarray) -> Tensor:
    return torch.from_numpy(np.append(ascending[::-1], 0).astype(np.float64))
