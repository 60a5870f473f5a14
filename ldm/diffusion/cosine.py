"""The cosine process in continuous time (Nichol & Dhariwal, arXiv 2102.09672; Hoogeboom et al., arXiv 2301.11093)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.process import ContinuousProcess, check_range

_NETWORK_UNIT = 1000.0


@dataclass(frozen=True)
class Cosine(ContinuousProcess):
    """x_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps for t in [0, 1]; networks are told 1000 t.

    The default `noisiest` leaves a signal of about 1e-3, from which every prediction can be undone; 1 leaves none.
    UserError for an empty range.
    """

    cleanest: float = 1e-3
    noisiest: float = 0.9994

    def __post_init__(self) -> None:
        check_range("Cosine", self.cleanest, self.noisiest)

    def _amounts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return _NETWORK_UNIT * t, torch.where(t < 1, angle.cos(), torch.zeros_like(t)), angle.sin()

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Solve log cot^2(pi t / 2) = log_snr for t."""
        return (torch.atan((-log_snr / 2).exp()) * (2 / math.pi)).clamp(max=self.noisiest)
