"""The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) as tables over the T discrete steps.

Equations 1-7 of "Denoising Diffusion Probabilistic Models" in their variance-preserving form: with betas b_t,
abar_t = prod_{s<=t} (1 - b_s), alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t). All tables are computed in float64
and stored in float32; their names are those of the published checkpoints. Step -1 stands for clean data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError

_SMALLEST_VARIANCE = 1e-20  # the posterior variance of step 0 is exactly 0; its logarithm is clipped here
_LARGEST_COSINE_BETA = 0.999


class Moments(NamedTuple):
    """Hold mean (B, C, H, W), variance and log variance (B, 1, 1, 1) of a Gaussian."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise UserError(f"schedule: num_steps is {num_steps}; it must be at least 1")


def _check_ends(start: float, end: float) -> None:
    if not (0 < start < 1 and 0 < end < 1):
        raise UserError(f"schedule: start {start} and end {end} must lie between 0 and 1")


def linear_betas(num_steps: int, start: float, end: float) -> np.ndarray:
    """Space the square roots of the betas evenly (the "linear" of the published models). Returns (T,) float64."""
    _check_num_steps(num_steps)
    _check_ends(start, end)
    return np.linspace(start**0.5, end**0.5, num_steps, dtype=np.float64) ** 2


def sqrt_linear_betas(num_steps: int, start: float, end: float) -> np.ndarray:
    """Space the betas themselves evenly. Returns (T,) float64."""
    _check_num_steps(num_steps)
    _check_ends(start, end)
    return np.linspace(start, end, num_steps, dtype=np.float64)


def sqrt_betas(num_steps: int, start: float, end: float) -> np.ndarray:
    """Take the square root of evenly spaced values. Returns (T,) float64."""
    return np.sqrt(sqrt_linear_betas(num_steps, start, end))


def cosine_betas(num_steps: int, s: float = 8e-3) -> np.ndarray:
    """Let abar fall as a squared cosine with offset `s` (Nichol & Dhariwal, eq. 17). Returns (T,) float64 <= 0.999."""
    _check_num_steps(num_steps)
    position = np.arange(num_steps + 1, dtype=np.float64) / num_steps + s
    abar = np.cos(position / (1 + s) * np.pi / 2) ** 2
    abar = abar / abar[0]
    return np.clip(1 - abar[1:] / abar[:-1], 0, _LARGEST_COSINE_BETA)


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Schedule:
    """Tabulate the forward process; every field is a float32 tensor (T,)."""

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    @classmethod
    def from_betas(cls, betas: np.ndarray | Sequence[float], posterior_weight: float = 0.0) -> Schedule:
        """Compute all tables from betas (T,) in (0, 1).

        `posterior_weight` v in [0, 1] mixes the two bounds of the reverse variance: (1 - v) * exact + v * beta.
        """
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise UserError("schedule: betas must be a vector of values strictly between 0 and 1")
        alphas = 1 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        exact_variance = betas * (1 - abar_prev) / (1 - abar)
        variance = (1 - posterior_weight) * exact_variance + posterior_weight * betas
        tables = (
            betas,
            abar,
            abar_prev,
            np.sqrt(abar),
            np.sqrt(1 - abar),
            np.log(1 - abar),
            np.sqrt(1 / abar),
            np.sqrt(1 / abar - 1),
            variance,
            np.log(np.maximum(variance, _SMALLEST_VARIANCE)),
            betas * np.sqrt(abar_prev) / (1 - abar),
            (1 - abar_prev) * np.sqrt(alphas) / (1 - abar),
        )
        return cls(*(torch.tensor(table, dtype=torch.float32) for table in tables))

    @classmethod
    def linear(
        cls, num_steps: int = 1000, start: float = 1e-4, end: float = 2e-2, posterior_weight: float = 0.0
    ) -> Schedule:
        """Build the schedule of the published models (evenly spaced square roots of beta)."""
        return cls.from_betas(linear_betas(num_steps, start, end), posterior_weight)

    @classmethod
    def sqrt_linear(
        cls, num_steps: int = 1000, start: float = 1e-4, end: float = 2e-2, posterior_weight: float = 0.0
    ) -> Schedule:
        """Build the schedule with evenly spaced betas (the "linear" of DDPM)."""
        return cls.from_betas(sqrt_linear_betas(num_steps, start, end), posterior_weight)

    @classmethod
    def sqrt(
        cls, num_steps: int = 1000, start: float = 1e-4, end: float = 2e-2, posterior_weight: float = 0.0
    ) -> Schedule:
        """Build the schedule whose betas are square roots of evenly spaced values."""
        return cls.from_betas(sqrt_betas(num_steps, start, end), posterior_weight)

    @classmethod
    def cosine(cls, num_steps: int = 1000, s: float = 8e-3, posterior_weight: float = 0.0) -> Schedule:
        """Build the squared-cosine schedule."""
        return cls.from_betas(cosine_betas(num_steps, s), posterior_weight)

    @property
    def num_steps(self) -> int:
        """Count the steps T."""
        return self.betas.shape[0]

    def buffers(self) -> dict[str, Tensor]:
        """Map the published buffer names to their tables, in the published order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> Schedule:
        """Copy the tables to `device`."""
        return Schedule(**{name: table.to(device) for name, table in self.buffers().items()})

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Look up alpha and sigma, each (B, 1, 1, 1), of steps t (B,) in [-1, T-1]; -1 is clean data (1, 0)."""
        clean = _per_sample(t < 0)
        index = t.clamp(min=0)
        alpha = _at(self.sqrt_alphas_cumprod, index).masked_fill(clean, 1.0)
        sigma = _at(self.sqrt_one_minus_alphas_cumprod, index).masked_fill(clean, 0.0)
        return alpha, sigma

    def diffuse(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t = alpha x0 + sigma noise; x0, noise (B, C, H, W), t (B,)."""
        alpha, sigma = self.level(t)
        return alpha * x0 + sigma * noise

    def diffusion_moments(self, x0: Tensor, t: Tensor) -> Moments:
        """Return the moments of q(x_t | x0)."""
        # 1 - abar from float32 abar, not sigma^2: the value that the published code reports
        return Moments(
            _at(self.sqrt_alphas_cumprod, t) * x0,
            _at(1 - self.alphas_cumprod, t),
            _at(self.log_one_minus_alphas_cumprod, t),
        )

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Moments:
        """Return the moments of q(x_{t-1} | x_t, x0); the log variance is clipped at log 1e-20."""
        mean = _at(self.posterior_mean_coef1, t) * x0 + _at(self.posterior_mean_coef2, t) * x_t
        return Moments(mean, _at(self.posterior_variance, t), _at(self.posterior_log_variance_clipped, t))

    def prior_bits_per_dim(self, x0: Tensor) -> Tensor:
        """Measure how much of x0 survives at step T-1: KL(q(x_T | x0) || N(0, 1)) in bits per dimension, (B,)."""
        mean, variance, log_variance = self.diffusion_moments(x0, torch.full_like(x0[:, 0, 0, 0], -1, dtype=torch.long))
        nats = 0.5 * (mean**2 + variance - log_variance - 1)
        return nats.flatten(1).mean(1) / math.log(2)


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]  # (B,) -> (B, 1, 1, 1)


def _at(table: Tensor, t: Tensor) -> Tensor:
    return _per_sample(table.to(t.device)[t])
