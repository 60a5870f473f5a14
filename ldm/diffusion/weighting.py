"""Weights of the training loss as functions of the level: w(level) times the squared error of the network's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.process import Level
from ldm.errors import UserError


class Weighting(Protocol):
    """Weigh the error of the output of each sample."""

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return the weights (B,) of the errors at these levels."""


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
        if self.gamma <= 0:
            raise UserError(f"weighting MinSNR: gamma is {self.gamma}; it must be above 0")

    def __call__(self, level: Level, prediction: Prediction) -> Tensor:
        """Return min(SNR, gamma) in the unit of the output, written without a division by alpha."""
        snr = (level.alpha / level.sigma) ** 2
        # an error of eps is one of x_0 times the SNR, so that min(SNR, gamma) / SNR weighs it
        return ((self.gamma / snr).clamp(max=1.0) * prediction.eps_error(level)).flatten()
