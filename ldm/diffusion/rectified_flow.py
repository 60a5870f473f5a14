"""Rectified flow: straight paths from data to noise (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.process import ContinuousProcess, check_range

_NETWORK_UNIT = 1000.0  # the published time embeddings resolve whole steps of about 1000


@dataclass(frozen=True)
class RectifiedFlow(ContinuousProcess):
    """x_t = (1 - t) x_0 + t eps for t in [0, 1]; networks are told 1000 t.

    At noisiest = 1 there is no signal left, which a prediction of eps cannot undo. UserError for an empty range.
    """

    cleanest: float = 1e-3
    noisiest: float = 1.0

    def __post_init__(self) -> None:
        check_range("RectifiedFlow", self.cleanest, self.noisiest)

    def _amounts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _NETWORK_UNIT * t, 1 - t, t

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Solve log((1 - t)^2 / t^2) = log_snr for t."""
        return torch.sigmoid(-log_snr / 2).clamp(max=self.noisiest)
