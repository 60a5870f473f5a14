"""Weights of the training loss as functions of the level: w(level) times the squared error of the network's output.

Whatever the loss is measured in, a weighting but `Unit` means the same: it is stated for the error of x_0 or of eps,
and converted. lambda is the log signal-to-noise ratio, SNR = alpha^2 / sigma^2 = e^lambda.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction, errors_of
from ldm.diffusion.process import Level, Process
from ldm.diffusion.times import Stratified, TimeDensity, Uniform
from ldm.errors import UserError

_NODES, _LOGIT = 16384, 14.0  # places of u, even in log(u / (1 - u)) up to this


class Weighting(Protocol):
    """Weigh the error of the output of each sample."""

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return the weights (B,) of the errors at these levels, of the space that `prediction` stands for."""


@dataclass(frozen=True)
class Unit:
    """Weigh all levels alike: the simple loss of whatever is predicted (DDPM, eq. 14)."""

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return ones."""
        return torch.ones_like(level.alpha).flatten()


@dataclass(frozen=True)
class MinSNR:
    """Weigh the error of x_0 by min(SNR, gamma) (Hang et al., arXiv 2303.09556, eq. 7), for every prediction.

    UserError unless gamma is positive.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive(self, "gamma")

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return min(SNR, gamma) in the unit of the output, written without a division by alpha."""
        snr = (level.alpha / level.sigma) ** 2
        # an error of eps is one of x_0 times the SNR, so that min(SNR, gamma) / SNR weighs it
        return ((self.gamma / snr).clamp(max=1.0) * prediction.eps_error(level)).flatten()


@dataclass(frozen=True)
class SoftMinSNR:
    """Weigh the error of x_0 by SNR gamma / (SNR + gamma), a smooth minimum (Crowson et al., arXiv 2401.11605, eq. 6).

    UserError unless gamma is positive.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive(self, "gamma")

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return the weights; of an error of eps gamma / (SNR + gamma)."""
        snr = (level.alpha / level.sigma) ** 2
        return (self.gamma / (snr + self.gamma) * prediction.eps_error(level)).flatten()


@dataclass(frozen=True)
class Sigmoid:
    """Weigh the error of eps by sigmoid(bias - lambda) (Kingma & Gao, arXiv 2303.00848; Hoogeboom et al., 2410.19324).

    It is SoftMinSNR with gamma = e^bias.
    """

    bias: float = 0.0

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return the weights."""
        return (torch.sigmoid(self.bias - level.log_snr) * prediction.eps_error(level)).flatten()


@dataclass(frozen=True)
class EDM:
    """Weigh the error of x_0 by (s^2 + sigma_data^2) / (s sigma_data)^2, s = sigma / alpha (arXiv 2206.00364, table 1).

    With `Preconditioned` of the same sigma_data that is 1. UserError unless sigma_data is positive.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_positive(self, "sigma_data")

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return the weights."""
        weights = self.sigma_data**-2 + (level.alpha / level.sigma) ** 2
        return (weights * errors_of(prediction, level).x0 ** 2).flatten()


@dataclass(frozen=True)
class VLB:
    """Weigh the error of eps as the variational bound does, in nats per dimension (Kingma et al., arXiv 2107.00630).

    By itself 1/2 for each unit of lambda (eq. 18); bound to a process and a density of times, 1/2 -d lambda / du for
    times drawn by u, or of a discrete process (SNR(t - 1) / SNR(t) - 1) T / 2, at step 0 as at step 1.
    """

    factor: Callable[[Level], Tensor] | None = None

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return the weights."""
        weights = prediction.eps_error(level).flatten() / 2
        return weights if self.factor is None else weights * self.factor(level)

    def bound(self, process: Process, times: TimeDensity) -> VLB:
        """Return the weighting for times that a density draws. UserError for whole steps of a density but `Uniform`."""
        times = times.density if isinstance(times, Stratified) else times
        if process.num_steps is not None and isinstance(times, Uniform):
            log_snr = process.level(torch.arange(process.num_steps, device="cpu")).log_snr.double().flatten()
            rise = torch.expm1(-log_snr.diff()) * process.num_steps
            return replace(self, factor=_Steps(torch.cat([rise[:1], rise]).float()))
        with torch.enable_grad():
            u = torch.sigmoid(torch.linspace(-_LOGIT, _LOGIT, _NODES, dtype=torch.float64, device="cpu"))
            log_snr = process.level(times(u.requires_grad_(), process).double()).log_snr.flatten()
            if not log_snr.requires_grad:
                raise UserError("weighting VLB: the process has whole steps, which need times Uniform and no shift")
            (slope,) = torch.autograd.grad(log_snr.sum(), u)
        falls = slope < 0  # not where a density keeps times within the range of the process
        places, logs = (values.detach()[falls].flip(0) for values in (log_snr, (-slope).log()))
        return replace(self, factor=_Interpolated(places, logs))


@dataclass(frozen=True, eq=False)
class _Steps:
    """A value for each whole step, (T,)."""

    table: Tensor

    def __call__(self, level: Level) -> Tensor:
        return self.table.to(level.time.device)[level.time.long()]


@dataclass(frozen=True, eq=False)
class _Interpolated:
    """Logarithms at rising places of lambda, (N,) each, between which they are interpolated; the ends go on."""

    places: Tensor
    logs: Tensor

    def __call__(self, level: Level) -> Tensor:
        at = level.log_snr.flatten().double()
        places, logs = self.places.to(at.device), self.logs.to(at.device)
        upper = torch.searchsorted(places, at).clamp(1, len(places) - 1)
        start, end = places[upper - 1], places[upper]
        share = ((at - start) / (end - start)).clamp(0, 1)
        return torch.lerp(logs[upper - 1], logs[upper], share).exp().to(level.alpha.dtype)


def _check_positive(weighting: MinSNR | SoftMinSNR | EDM, name: str) -> None:
    value = getattr(weighting, name)
    if not value > 0:
        raise UserError(f"weighting {type(weighting).__name__}: {name} is {value}; it must be above 0")
