"""The variance-exploding process of EDM, whose time is the standard deviation of the noise (arXiv 2206.00364)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.process import ContinuousProcess, Level, check_range, per_sample

_NETWORK_UNIT = 250.0  # c_noise = log(sigma) / 4 (table 1), times 1000 as the published time embeddings expect


@dataclass(frozen=True)
class EDM(ContinuousProcess):
    """x_t = x_0 + t eps for t in [cleanest, noisiest]; networks are told 250 log t.

    sigma_data: standard deviation of the data, by which inputs of networks without preconditioning are scaled.
    UserError for an empty range.
    """

    cleanest: float = 0.002
    noisiest: float = 80.0
    sigma_data: float = 0.5
    grid = "karras"

    def __post_init__(self) -> None:
        check_range("EDM", self.cleanest, self.noisiest)

    def _amounts(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _NETWORK_UNIT * t.clamp(min=self.cleanest).log(), torch.ones_like(t), t

    def level(self, t: Tensor) -> Level:
        """Return the levels at standard deviations t (B,)."""
        level = super().level(t)
        return level._replace(input_scale=per_sample((t**2 + self.sigma_data**2).rsqrt()))

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return sigma = exp(-log_snr / 2)."""
        return (-log_snr / 2).exp().clamp(self.cleanest, self.noisiest)

    def from_uniform(self, u: Tensor) -> Tensor:
        """Map u (B,) in [0, 1) to times that are uniform in log sigma."""
        return self.cleanest * (self.noisiest / self.cleanest) ** u
