"""What the network predicts: the noise, the data, or the velocity.

With x_t = alpha x0 + sigma eps and alpha^2 + sigma^2 = 1, each of eps, x0 and v = alpha eps - sigma x0 (Salimans & Ho,
section 4) determines the other two given x_t. A prediction always carries x0 and eps, so samplers never convert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ldm.diffusion.process import Schedule


class Prediction(NamedTuple):
    """Hold the predicted clean data and the predicted noise, both (B, C, H, W)."""

    x0: Tensor
    eps: Tensor


Denoise = Callable[[Tensor, Tensor], Prediction]


class Parameterization(Protocol):
    """Relate the output of the network to (x0, eps)."""

    def target(self, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the regression target (B, C, H, W)."""

    def predict(self, schedule: Schedule, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Turn the output of the network into a prediction."""

    def vlb_weights(self, schedule: Schedule) -> Tensor:
        """Return the weight (T,) of the squared error in the variational bound."""


def _epsilon_vlb_weights(schedule: Schedule) -> Tensor:
    """Return beta^2 / (2 var alpha (1 - abar)), DDPM eq. 12; infinite at t = 0 when the posterior variance is 0."""
    variance, abar = schedule.posterior_variance, schedule.alphas_cumprod
    alphas = abar / schedule.alphas_cumprod_prev  # keeps its digits where beta is close to 1
    return schedule.betas**2 / (2 * variance * alphas * (1 - abar))


def _finite_at_zero(weights: Tensor) -> Tensor:
    """Replace the weight of step 0, where the bound is a likelihood and no squared error, by that of step 1."""
    weights = weights.clone()
    weights[0] = weights[1] if len(weights) > 1 else 0.0
    return weights


def epsilon_to_x0(schedule: Schedule, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Solve x_t = alpha x0 + sigma eps for x0; all (B, C, H, W), t (B,) in [0, T-1]."""
    index = t.to(schedule.betas.device)
    recip, recipm1 = schedule.sqrt_recip_alphas_cumprod[index], schedule.sqrt_recipm1_alphas_cumprod[index]
    shape = (-1, 1, 1, 1)
    return recip.view(shape).to(x_t.device) * x_t - recipm1.view(shape).to(x_t.device) * eps


@dataclass(frozen=True)
class Epsilon:
    """Predict the noise."""

    def target(self, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noise."""
        return noise

    def predict(self, schedule: Schedule, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read the output as eps."""
        return Prediction(epsilon_to_x0(schedule, output, x_t, t), output)

    def vlb_weights(self, schedule: Schedule) -> Tensor:
        """Return the weights (T,) of DDPM eq. 12, that of step 0 copied from step 1."""
        return _finite_at_zero(_epsilon_vlb_weights(schedule))


@dataclass(frozen=True)
class Sample:
    """Predict the data.

    The published VLB weights read sqrt(abar) / 2 / (2 * 1 - abar), a slip of precedence that released recipes carry;
    `exact_vlb` converts the weights of eps instead: (eps error)^2 = abar / (1 - abar) (x0 error)^2.
    """

    exact_vlb: bool = False

    def target(self, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the data."""
        return x0

    def predict(self, schedule: Schedule, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read the output as x0; needs t >= 0."""
        alpha, sigma = schedule.level(t)
        return Prediction(output, (x_t - alpha * output) / sigma)

    def vlb_weights(self, schedule: Schedule) -> Tensor:
        """Return the weights (T,), that of step 0 copied from step 1."""
        abar = schedule.alphas_cumprod
        if self.exact_vlb:
            return _finite_at_zero(_epsilon_vlb_weights(schedule) * abar / (1 - abar))
        return _finite_at_zero(0.5 * abar.sqrt() / (2 - abar))


@dataclass(frozen=True)
class Velocity:
    """Predict v = alpha eps - sigma x0."""

    def target(self, schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity."""
        alpha, sigma = schedule.level(t)
        return alpha * noise - sigma * x0

    def predict(self, schedule: Schedule, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read the output as v."""
        alpha, sigma = schedule.level(t)
        return Prediction(alpha * x_t - sigma * output, alpha * output + sigma * x_t)

    def vlb_weights(self, schedule: Schedule) -> Tensor:
        """Convert the weights of eps: (eps error)^2 = abar (v error)^2."""
        return _finite_at_zero(_epsilon_vlb_weights(schedule) * schedule.alphas_cumprod)
