"""The forward process on a continuous time axis: x_t = alpha(t) x_0 + sigma(t) eps.

A process says how much signal and noise there is at a real time t in its own unit; it is told apart from others by
nothing else. Nothing here assumes alpha^2 + sigma^2 = 1: variance-preserving, rectified-flow and variance-exploding
processes are each one small class. The signal-to-noise ratio is alpha^2 / sigma^2 (Kingma et al., "Variational
diffusion models").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ldm.errors import UserError


class Level(NamedTuple):
    """Signal and noise of samples: x_t = alpha x_0 + sigma eps.

    time (B,) is what a network is told, on the scale of the published embeddings (about 0 to 1000); alpha, sigma
    (B, 1, 1, 1); input_scale, a number or (B, 1, 1, 1), brings x_t to about unit variance for networks without
    preconditioning, and is 1 where the process does that itself.
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    input_scale: Tensor | float = 1.0

    @property
    def log_snr(self) -> Tensor:
        """Log of alpha^2 / sigma^2, (B, 1, 1, 1); infinite for clean data, minus infinite for noise alone."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def diffuse(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Return x_t = alpha x0 + sigma eps; x0, eps (B, C, H, W)."""
        return self.alpha * x0 + self.sigma * eps


class Process(Protocol):
    """A Gaussian forward process. Times are real numbers in the unit of the process and grow with the noise.

    clean: time of clean data (sigma = 0); cleanest, noisiest: ends of the range that a network learns, `noisiest` being
    where sampling begins; prior_std: standard deviation of x at `noisiest`; num_steps: number of steps of a discrete
    process, None for a continuous one; grid: name of the grid of times on which samplers walk by default;
    posterior_weight: v in [0, 1] mixes the bounds of the variance of an ancestral step: (1 - v) * exact + v * added.
    """

    clean: float
    cleanest: float
    noisiest: float
    num_steps: int | None
    grid: str
    posterior_weight: float

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise from which sampling starts."""

    def level(self, t: Tensor) -> Level:
        """Return the levels at times t (B,), in the dtype of t or float32, and on its device."""

    def from_uniform(self, u: Tensor) -> Tensor:
        """Map u (B,) in [0, 1) to times (B,), uniformly over the range that is learned, the cleanest first."""

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the times (B,) at which the process has this log signal-to-noise ratio."""

    def buffers(self) -> dict[str, Tensor]:
        """Return the tables that checkpoints hold, by their published names; continuous processes have none."""

    def with_buffers(self, buffers: dict[str, Tensor]) -> Self:
        """Return the process that these tables describe."""


class ContinuousProcess:
    """What processes without tables have in common. A subclass writes `_amounts` and `from_log_snr`."""

    clean: float = 0.0
    cleanest: float
    noisiest: float
    num_steps: None = None
    grid = "uniform"
    posterior_weight = 0.0

    def _amounts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the network is told, alpha and sigma at times t; each (B,)."""
        raise NotImplementedError

    def level(self, t: Tensor) -> Level:
        """Return the levels at times t (B,)."""
        time, alpha, sigma = self._amounts(t if t.is_floating_point() else t.float())
        return Level(time, per_sample(alpha), per_sample(sigma))

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise from which sampling starts."""
        level = self.level(torch.tensor([self.noisiest], dtype=torch.float64, device="cpu"))
        return level.sigma.item()

    def from_uniform(self, u: Tensor) -> Tensor:
        """Map u (B,) in [0, 1) to times, evenly from `cleanest` to `noisiest`."""
        return self.cleanest + u * (self.noisiest - self.cleanest)

    def buffers(self) -> dict[str, Tensor]:
        """Return no tables."""
        return {}

    def with_buffers(self, buffers: dict[str, Tensor]) -> Self:
        """Return this process, which no table changes."""
        return self


@dataclass(frozen=True)
class Shifted(ContinuousProcess):
    """Another process with more noise at each time, as larger images need.

    The noise-to-signal ratio sigma / alpha is `factor` times as large, i.e. the log SNR is 2 log(factor) lower, within
    the range of the process. An image of n times the side has n times the ratio after averaging (Hoogeboom et al.,
    "Simple diffusion", section 3.1; Esser et al., "Scaling rectified flow transformers", eq. 23, for rectified flow).
    What would lie beyond the noisiest level is that level. Of a discrete process it has times between the steps, but
    no steps of its own. UserError unless factor > 0.
    """

    process: Process
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise UserError(f"shift: factor is {self.factor}; it must be above 0, and above 1 for larger images")
        for name in ("clean", "cleanest", "noisiest", "grid"):
            object.__setattr__(self, name, getattr(self.process, name))

    def level(self, t: Tensor) -> Level:
        """Return the level that the inner process has at the shifted time."""
        t = t if t.is_floating_point() else t.float()
        log_snr = self.process.level(t).log_snr.flatten() - 2 * math.log(self.factor)
        return self.process.level(torch.where(t <= self.clean, t, self.process.from_log_snr(log_snr)))

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the times at which the shifted process has this log signal-to-noise ratio."""
        return self.process.from_log_snr(log_snr + 2 * math.log(self.factor))

    def from_uniform(self, u: Tensor) -> Tensor:
        """Map u (B,) in [0, 1) to times as the inner process does."""
        return self.process.from_uniform(u)

    def buffers(self) -> dict[str, Tensor]:
        """Return the tables of the inner process."""
        return self.process.buffers()

    def with_buffers(self, buffers: dict[str, Tensor]) -> Shifted:
        """Return the shifted process over the inner process that these tables describe."""
        return Shifted(self.process.with_buffers(buffers), self.factor)


class Moments(NamedTuple):
    """Mean (B, C, H, W), variance and log variance (B, 1, 1, 1) of a Gaussian."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def per_sample(values: Tensor) -> Tensor:
    """Add the dimensions of an image: (B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]


def float64_levels(process: Process, times: Tensor) -> tuple[list[float], list[float]]:
    """Return alpha and sigma at times (N,) as Python numbers in double precision, for the steps of a sampler."""
    level = process.level(times.double().cpu())
    return level.alpha.double().flatten().tolist(), level.sigma.double().flatten().tolist()


def check_range(name: str, start: float, end: float) -> None:
    """Raise UserError unless 0 <= start < end."""
    if not 0 <= start < end:
        raise UserError(f"{name}: cleanest {start:g} and noisiest {end:g} must satisfy 0 <= cleanest < noisiest")
