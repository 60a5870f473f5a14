"""The published process: T discrete steps of q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), continued between the steps.

Equations 1-7 of "Denoising Diffusion Probabilistic Models" in their variance-preserving form: with betas b_t,
abar_t = prod_{s<=t} (1 - b_s), alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t). All tables are computed in float64
and stored in float32; their names are those of the published checkpoints. Between two steps the log signal-to-noise
ratio is interpolated linearly; step -1 is clean data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from ldm.bounds import Fraction, Gt, Lt, Size
from ldm.diffusion.grids import Grid
from ldm.diffusion.process import Level, Moments, per_sample
from ldm.errors import UserError

_SMALLEST_VARIANCE = 1e-20  # the posterior variance of step 0 is exactly 0; its logarithm is clipped here
_LARGEST_COSINE_BETA = 0.999
Beta = Annotated[float, Gt(0), Lt(1)]


def linear_betas(num_steps: int, start: float, end: float) -> np.ndarray:
    """Space the square roots of the betas evenly (the "linear" of the published models). Returns (T,) float64."""
    return np.linspace(np.sqrt(start), np.sqrt(end), num_steps, dtype=np.float64) ** 2


def sqrt_linear_betas(num_steps: int, start: float, end: float) -> np.ndarray:
    """Space the betas themselves evenly. Returns (T,) float64."""
    return np.linspace(start, end, num_steps, dtype=np.float64)


def sqrt_betas(num_steps: int, start: float, end: float) -> np.ndarray:
    """Take the square root of evenly spaced values. Returns (T,) float64."""
    return np.sqrt(sqrt_linear_betas(num_steps, start, end))


def cosine_betas(num_steps: int, s: float = 8e-3) -> np.ndarray:
    """Let abar fall as a squared cosine with offset `s` (Nichol & Dhariwal, eq. 17). Returns (T,) float64 <= 0.999."""
    position = np.arange(num_steps + 1, dtype=np.float64) / num_steps + s
    abar = np.cos(position / (1 + s) * np.pi / 2) ** 2
    abar = abar / abar[0]
    return np.clip(1 - abar[1:] / abar[:-1], 0, _LARGEST_COSINE_BETA)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Change betas (T,) so that the last step has no signal left (Lin et al., arXiv 2305.08891, algorithm 1)."""
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    abar = alpha**2
    return 1 - np.append(abar[0], abar[1:] / abar[:-1])


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class DiscreteVP:
    """The variance-preserving process of T steps. Its time is the number of a step, 0 to T - 1; -1 is clean data.

    tables: the twelve float32 tables (T,) that checkpoints hold, by their published names; made by `from_betas` and by
    the constructors of the published schedules. grid: on which samplers walk by default.
    """

    tables: dict[str, Tensor]
    posterior_weight: float = 0.0
    grid: Grid | str = "uniform"
    clean = -1.0
    cleanest = 0.0
    prior_std = 1.0

    @classmethod
    def from_betas(
        cls, betas: np.ndarray | Sequence[float], posterior_weight: Fraction = 0.0, zero_terminal_snr: bool = False
    ) -> DiscreteVP:
        """Compute all tables from betas (T,) in (0, 1).

        Args:
            betas: Variance added by each step.
            posterior_weight: v in [0, 1] mixes the two bounds of the reverse variance: (1 - v) * exact + v * beta.
            zero_terminal_snr: Rescale the betas so that the last step is noise alone.
        """
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise UserError("schedule: betas must be values strictly between 0 and 1; check num_steps, start and end")
        if zero_terminal_snr:
            betas = rescale_zero_terminal_snr(betas)
        alphas = 1 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        variance = (1 - posterior_weight) * betas * (1 - abar_prev) / (1 - abar) + posterior_weight * betas
        with np.errstate(divide="ignore"):  # without signal at the last step, its reciprocals are infinite
            tables = {
                "betas": betas,
                "alphas_cumprod": abar,
                "alphas_cumprod_prev": abar_prev,
                "sqrt_alphas_cumprod": np.sqrt(abar),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
                "log_one_minus_alphas_cumprod": np.log(1 - abar),
                "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
                "posterior_variance": variance,
                "posterior_log_variance_clipped": np.log(np.maximum(variance, _SMALLEST_VARIANCE)),
                "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1 - abar),
                "posterior_mean_coef2": (1 - abar_prev) * np.sqrt(alphas) / (1 - abar),
            }
        kept = {name: torch.tensor(table, dtype=torch.float32, device="cpu") for name, table in tables.items()}
        return cls(kept, posterior_weight)

    @classmethod
    def linear(
        cls,
        num_steps: Size = 1000,
        start: Beta = 1e-4,
        end: Beta = 2e-2,
        posterior_weight: Fraction = 0.0,
        zero_terminal_snr: bool = False,
    ) -> DiscreteVP:
        """Build the schedule of the published models (evenly spaced square roots of beta)."""
        return cls.from_betas(linear_betas(num_steps, start, end), posterior_weight, zero_terminal_snr)

    @classmethod
    def sqrt_linear(
        cls,
        num_steps: Size = 1000,
        start: Beta = 1e-4,
        end: Beta = 2e-2,
        posterior_weight: Fraction = 0.0,
        zero_terminal_snr: bool = False,
    ) -> DiscreteVP:
        """Build the schedule with evenly spaced betas (the "linear" of DDPM)."""
        return cls.from_betas(sqrt_linear_betas(num_steps, start, end), posterior_weight, zero_terminal_snr)

    @classmethod
    def sqrt(
        cls, num_steps: Size = 1000, start: Beta = 1e-4, end: Beta = 2e-2, posterior_weight: Fraction = 0.0
    ) -> DiscreteVP:
        """Build the schedule whose betas are square roots of evenly spaced values."""
        return cls.from_betas(sqrt_betas(num_steps, start, end), posterior_weight)

    @classmethod
    def cosine(
        cls,
        num_steps: Size = 1000,
        s: float = 8e-3,
        posterior_weight: Fraction = 0.0,
        zero_terminal_snr: bool = False,
    ) -> DiscreteVP:
        """Build the squared-cosine schedule."""
        return cls.from_betas(cosine_betas(num_steps, s), posterior_weight, zero_terminal_snr)

    @classmethod
    def on_grid(cls, process: DiscreteVP, grid: Grid | str) -> DiscreteVP:
        """Return a process on which samplers walk this grid unless told otherwise."""
        return replace(process, grid=grid)

    # --- the process -----------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Number of steps T."""
        return len(self.tables["betas"])

    @property
    def noisiest(self) -> float:
        """The last step."""
        return float(self.num_steps - 1)

    def level(self, t: Tensor) -> Level:
        """Return the levels at times t (B,) in [-1, T - 1]; at whole steps those of the tables.

        In float64, if t is, they are computed from the float32 table of abar, as the published samplers do.
        """
        if t.is_floating_point():
            return self._between_steps(t)
        clean, index = per_sample(t < 0), t.clamp(min=0)
        alpha = self.at("sqrt_alphas_cumprod", index).masked_fill(clean, 1.0)
        sigma = self.at("sqrt_one_minus_alphas_cumprod", index).masked_fill(clean, 0.0)
        return Level(t, alpha, sigma)

    def _between_steps(self, t: Tensor) -> Level:
        lower = t.floor().clamp(0, self.num_steps - 1)
        index, weight = lower.long(), (t - lower).clamp(min=0)
        tables = [table.to(t.device) for table in self._amounts(t.dtype)]
        alpha, sigma, log_snr = (table[index] for table in tables)
        upper = tables[2][(index + 1).clamp(max=self.num_steps - 1)]
        log_snr = torch.where(weight > 0, torch.lerp(log_snr, upper, weight), log_snr)
        alpha = torch.where(weight > 0, torch.sigmoid(log_snr).sqrt(), alpha)
        sigma = torch.where(weight > 0, torch.sigmoid(-log_snr).sqrt(), sigma)
        # Between clean data and step 0, where the log ratio is infinite, the noise grows linearly.
        early = (t + 1).clamp(0, 1)
        sigma = torch.where(t < 0, early * sigma, sigma)
        alpha = torch.where(t < 0, (1 - sigma**2).sqrt(), alpha)
        return Level(t, per_sample(alpha), per_sample(sigma))

    def _amounts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha, sigma and log SNR of all steps, (T,)."""
        abar = self.tables["alphas_cumprod"].double()
        log_snr = (abar.log() - torch.log1p(-abar)).to(dtype)
        if dtype == torch.float64:
            return abar.sqrt(), (1 - abar).sqrt(), log_snr
        names = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return *(self.tables[name].to(dtype) for name in names), log_snr

    def from_uniform(self, u: Tensor) -> Tensor:
        """Map u (B,) in [0, 1) to whole steps, int64 (B,)."""
        return (u * self.num_steps).long().clamp(max=self.num_steps - 1)

    def from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the times in [0, T - 1] between whose steps the log signal-to-noise ratio is interpolated."""
        table = self._amounts(torch.float64)[2].to(log_snr.device)  # falls with the step
        upper = torch.searchsorted(-table, -log_snr.double()).clamp(1, self.num_steps - 1)
        start, end = table[upper - 1], table[upper]
        weight = torch.where(log_snr <= end, 1.0, ((start - log_snr) / (start - end)).clamp(0, 1))
        return (upper - 1 + weight).to(log_snr.dtype)

    def buffers(self) -> dict[str, Tensor]:
        """Return the tables by their published names, in the published order."""
        return self.tables

    def with_buffers(self, buffers: dict[str, Tensor]) -> DiscreteVP:
        """Return the process that these tables describe."""
        return replace(self, tables=buffers)

    def to(self, device: torch.device | str) -> DiscreteVP:
        """Copy the tables to a device."""
        return self.with_buffers({name: table.to(device) for name, table in self.tables.items()})

    # --- what only the discrete process has ------------------------------------------------------------------------

    def at(self, name: str, t: Tensor) -> Tensor:
        """Look up a table at whole steps t (B,), int64: (B, 1, 1, 1) on the device of t."""
        return per_sample(self.tables[name].to(t.device)[t])

    def diffusion_moments(self, x0: Tensor, t: Tensor) -> Moments:
        """Return the moments of q(x_t | x_0) at whole steps t (B,), int64."""
        # 1 - abar from float32 abar, not sigma^2: the value that the published code reports
        variance = 1 - self.at("alphas_cumprod", t)
        return Moments(self.at("sqrt_alphas_cumprod", t) * x0, variance, self.at("log_one_minus_alphas_cumprod", t))

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Moments:
        """Return the moments of q(x_{t-1} | x_t, x_0) at whole steps t (B,); log variances are at least log 1e-20."""
        mean = self.at("posterior_mean_coef1", t) * x0 + self.at("posterior_mean_coef2", t) * x_t
        return Moments(mean, self.at("posterior_variance", t), self.at("posterior_log_variance_clipped", t))

    def vlb_weights(self) -> Tensor:
        """Return the weights (T,) of the squared error of eps in the variational bound (DDPM, eq. 12).

        At step 0, where the bound is a likelihood and no squared error, they are infinite unless posterior_weight > 0.
        """
        abar, betas = self.tables["alphas_cumprod"], self.tables["betas"]
        alphas = abar / self.tables["alphas_cumprod_prev"]  # keeps its digits where beta is close to 1
        return betas**2 / (2 * self.tables["posterior_variance"] * alphas * (1 - abar))

    def prior_bits_per_dim(self, x0: Tensor) -> Tensor:
        """Return KL(q(x_{T-1} | x_0) || N(0, 1)) in bits per dimension, (B,): how much of x_0 survives."""
        last = torch.full_like(x0[:, 0, 0, 0], self.num_steps - 1, dtype=torch.long)
        mean, variance, log_variance = self.diffusion_moments(x0, last)
        nats = 0.5 * (mean**2 + variance - log_variance - 1)
        return nats.flatten(1).mean(1) / math.log(2)
