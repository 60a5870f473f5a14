"""Densities of training times: from uniform numbers to times of any process.

A density is called with uniforms, so that the times of samples are functions of (seed, number of the sample), and
validation can use evenly spread ones. In log(sigma / alpha) a density means the same for every process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.errors import UserError

_SMALLEST_UNIFORM = 2.0**-26  # keyed uniforms have 24 bits; the quantile of 0 would be infinite
_MOST_OUTSIDE = 0.1


class TimeDensity(Protocol):
    """Map uniforms u (B,) in [0, 1) to times (B,) of a process, growing with u."""

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """Return the times."""

    def check(self, process: Process) -> None:
        """Raise UserError if the process cannot have this density."""


@dataclass(frozen=True)
class Uniform:
    """As the process spreads uniforms: whole steps, or evenly over the axis."""

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """Return the times."""
        return process.from_uniform(u)

    def check(self, process: Process) -> None:
        """Accept every process."""


@dataclass(frozen=True)
class LogitNormal:
    """More times in the middle: logit(u') ~ N(mean, std^2) (Esser et al., arXiv 2403.03206, section 3.1).

    UserError unless std is positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std("LogitNormal", self.std)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """Return the times."""
        return process.from_uniform(torch.sigmoid(self.mean + self.std * _normal_quantile(u)).clamp(max=1 - 2.0**-24))

    def check(self, process: Process) -> None:
        """Accept every process."""


@dataclass(frozen=True)
class LogNormal:
    """EDM's density: log(sigma / alpha) ~ N(mean, std^2) (Karras et al., arXiv 2206.00364, table 1).

    What lies outside of the range of the process is moved to its end. UserError unless std is positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_std("LogNormal", self.std)

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """Return the times."""
        log_snr = -2 * (self.mean + self.std * _normal_quantile(u))
        return process.from_log_snr(log_snr).clamp(process.cleanest, process.noisiest)

    def check(self, process: Process) -> None:
        """Raise UserError if more than a tenth of the density lies outside of the range of the process."""
        ends = process.level(torch.tensor([process.cleanest, process.noisiest], dtype=torch.float64, device="cpu"))
        low, high = (-ends.log_snr.flatten() / 2).tolist()  # log(sigma / alpha)
        outside = _normal_cdf((low - self.mean) / self.std) + 1 - _normal_cdf((high - self.mean) / self.std)
        if outside > _MOST_OUTSIDE:
            raise UserError(
                f"times LogNormal: {outside:.0%} of N({self.mean:g}, {self.std:g}) lies outside of log(sigma / alpha) "
                f"from {low:.3g} to {high:.3g}, which {type(process).__name__} has; choose another mean or std"
            )


@dataclass(frozen=True)
class Stratified:
    """Another density, of which consecutive samples take one share each: sample n has u in share n mod `strata`.

    The mean over a batch varies less (Kingma et al., arXiv 2107.00630, appendix I.1). strata: number of shares, best
    the global batch or a divisor of it; times of samples do not depend on the number of ranks. UserError below 1.
    """

    density: TimeDensity = Uniform()
    strata: int = 64

    def __post_init__(self) -> None:
        if self.strata < 1:
            raise UserError(f"times Stratified: strata is {self.strata}; use 1 or more, best the global batch")

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        """Return the times of the other density."""
        return self.density(u, process)

    def check(self, process: Process) -> None:
        """Raise UserError if the process cannot have the other density."""
        self.density.check(process)

    def spread(self, u: Tensor, numbers: Tensor) -> Tensor:
        """Return uniforms (B,) in the shares of samples of these numbers, int64 (B,)."""
        return ((numbers % self.strata + u.double()) / self.strata).clamp(max=1 - 2.0**-24).to(u.dtype)


def golden_ratio_uniforms(numbers: Tensor) -> Tensor:
    """Return uniforms (B,), float64, for samples of these numbers (B,): a fixed sequence that covers [0, 1) evenly.

    Multiples of the golden ratio modulo 1: any run of consecutive samples is close to evenly spaced.
    """
    return (numbers.double() + 0.5) * ((math.sqrt(5) - 1) / 2) % 1.0


def _check_std(name: str, std: float) -> None:
    if std <= 0:
        raise UserError(f"times {name}: std is {std}; it must be above 0")


def _normal_quantile(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.double().clamp(min=_SMALLEST_UNIFORM)).to(u.dtype)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
