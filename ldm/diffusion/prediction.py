"""What the network predicts, and what it sees: eps, x_0, v, the flow, or the F of EDM.

With x_t = alpha x_0 + sigma eps, each of these determines x_0 and eps given x_t, also where alpha^2 + sigma^2 is not 1.
A denoiser always returns both, so samplers never convert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.process import Level, Process
from ldm.errors import UserError


class _Both(NamedTuple):
    x0: Tensor
    eps: Tensor


class Denoised(_Both):
    """The predicted clean data x0 and the predicted noise eps, both (B, C, H, W).

    share: where in its range the logarithm of the variance of an ancestral step lies, from 0, that of the posterior, to
    1, that of the added noise (Nichol & Dhariwal, arXiv 2102.09672, eq. 15); None where the network does not say it.
    """

    share: Tensor | None = None

    def with_share(self, share: Tensor | None) -> Denoised:
        """Return the same prediction with this share (B, C, H, W)."""
        both = Denoised(*self)
        both.share = share
        return both


Denoise = Callable[[Tensor, Tensor], Denoised]  # x_t (B, C, H, W), t (B,) in the unit of the process


class Prediction(Protocol):
    """Relate the input and the output of a network to x_t, x_0 and eps; all (B, C, H, W).

    needs_signal: whether x_0 cannot be had from the output where alpha is 0.
    """

    needs_signal: bool

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return what the network sees: an image (B, C, H, W) and a time (B,)."""

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return what the network is trained to output."""

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Denoised:
        """Return x_0 and eps from the output of the network."""

    def eps_error(self, level: Level) -> Tensor:
        """Return the squared error of eps that comes with an error of 1 in the output, (B, 1, 1, 1)."""

    def vlb_weights(self, eps_weights: Tensor, level: Level) -> Tensor:
        """Convert weights (B,) of the error of eps in the variational bound into those of the error of the output."""


def check_prediction(prediction: Prediction, process: Process) -> None:
    """Raise UserError if a prediction says nothing about x_0 at the noisiest time of a process, where walks begin."""
    noisiest = torch.tensor([process.noisiest], dtype=torch.float64, device="cpu")  # also where models are made on meta
    alpha = process.level(noisiest).alpha.item()
    if prediction.needs_signal and alpha == 0:
        name = type(prediction).__name__
        raise UserError(
            f"prediction {name}: {type(process).__name__} has no signal at t = {process.noisiest:g} (zero terminal "
            "SNR), where noise says nothing about the data; use Velocity, Flow or Sample"
        )


def errors_of(prediction: Prediction, level: Level) -> Denoised:
    """Return the errors of x_0 and eps that come with an error of 1 in the output, (B, 1, 1, 1) each."""
    one, nothing = torch.ones_like(level.alpha), torch.zeros_like(level.alpha)
    return prediction.denoised(one, nothing, level)  # linear in the output and in x_t


def error_in(space: Prediction, prediction: Prediction, level: Level) -> Tensor:
    """Return the error in another space that comes with an error of 1 in the output, (B, 1, 1, 1)."""
    return space.target(*errors_of(prediction, level), level)


class _Prediction:
    """What most predictions share. A subclass writes `target` and `denoised`."""

    needs_signal = False

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return x_t, scaled to about unit variance where the process does not keep it, and the time."""
        if isinstance(level.input_scale, Tensor):
            x_t = x_t * level.input_scale.to(x_t.dtype)
        return x_t, level.time

    def eps_error(self, level: Level) -> Tensor:
        """Return the squared error of eps that comes with an error of 1 in the output, (B, 1, 1, 1)."""
        return errors_of(self, level).eps ** 2

    def vlb_weights(self, eps_weights: Tensor, level: Level) -> Tensor:
        """Convert weights (B,) of the error of eps in the variational bound into those of the error of the output."""
        return eps_weights * self.eps_error(level).flatten()


@dataclass(frozen=True)
class Epsilon(_Prediction):
    """Predict the noise (Ho et al., "Denoising diffusion probabilistic models", eq. 14)."""

    needs_signal = True

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return the noise."""
        return eps

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Denoised:
        """Read the output as eps."""
        return Denoised(x0_from_eps(output, x_t, level), output)


def x0_from_eps(eps: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """Solve x_t = alpha x_0 + sigma eps for x_0."""
    return (x_t - level.sigma * eps) / level.alpha


def eps_from_x0(x0: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """Solve x_t = alpha x_0 + sigma eps for eps."""
    return (x_t - level.alpha * x0) / level.sigma


@dataclass(frozen=True)
class Sample(_Prediction):
    """Predict the data.

    The published weights of the variational bound read sqrt(abar) / 2 / (2 * 1 - abar), a slip of precedence that
    released recipes carry; `exact_vlb` uses the exact ones instead.
    """

    exact_vlb: bool = False

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return the data."""
        return x0

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Denoised:
        """Read the output as x_0; needs sigma > 0."""
        return Denoised(output, eps_from_x0(output, x_t, level))

    def vlb_weights(self, eps_weights: Tensor, level: Level) -> Tensor:
        """Return the published weights, or convert those of eps if `exact_vlb` asks for it."""
        if self.exact_vlb:
            return super().vlb_weights(eps_weights, level)
        alpha = level.alpha.flatten()
        return 0.5 * alpha / (2 - alpha**2)


@dataclass(frozen=True)
class Velocity(_Prediction):
    """Predict v = alpha eps - sigma x_0 (Salimans & Ho, "Progressive distillation", section 4)."""

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return the velocity."""
        return level.alpha * eps - level.sigma * x0

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Denoised:
        """Read the output as v."""
        alpha, sigma = level.alpha, level.sigma
        power = alpha**2 + sigma**2
        return Denoised((alpha * x_t - sigma * output) / power, (alpha * output + sigma * x_t) / power)


@dataclass(frozen=True)
class Flow(_Prediction):
    """Predict eps - x_0, the velocity of a rectified flow (Lipman et al., "Flow matching", section 4)."""

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return eps - x_0."""
        return eps - x0

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Denoised:
        """Read the output as eps - x_0."""
        total = level.alpha + level.sigma
        return Denoised((x_t - level.sigma * output) / total, (x_t + level.alpha * output) / total)


@dataclass(frozen=True)
class DataFlow(_Prediction):
    """Predict x_0 - eps, told a time that grows towards the data from 0 to 1: the convention of the released SiT (Ma et
    al., arXiv 2401.08740) and LightningDiT checkpoints.
    """

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return x_t as in `Flow`, and 1 - t for a process that tells 1000 t."""
        x_t, time = _FLOW.inputs(x_t, level)
        return x_t, 1 - time / 1000

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return x_0 - eps."""
        return x0 - eps

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Denoised:
        """Read the output as x_0 - eps."""
        return _FLOW.denoised(-output, x_t, level)

    def eps_error(self, level: Level) -> Tensor:
        """Return (alpha / (alpha + sigma))^2."""
        return _FLOW.eps_error(level)


_FLOW = Flow()


@dataclass(frozen=True)
class Preconditioned(_Prediction):
    """Predict the F of EDM: x_0 = c_skip x + c_out F(c_in x; c_noise) (Karras et al., arXiv 2206.00364, eq. 7).

    There x = x_t / alpha has noise sigma / alpha; written with x_t, the factors also hold where alpha is 0. The
    squared error of F is EDM's loss: its weighting lambda(sigma) is 1 / c_out^2. sigma_data: standard deviation of
    the data. UserError unless it is positive.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if self.sigma_data <= 0:
            raise UserError(f"Preconditioned: sigma_data is {self.sigma_data}; it is a standard deviation, above 0")

    def _factors(self, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_in, c_skip and c_out, of x_t."""
        variance = (level.alpha * self.sigma_data) ** 2 + level.sigma**2
        c_in = variance.rsqrt()
        return c_in, level.alpha * self.sigma_data**2 / variance, level.sigma * self.sigma_data * c_in

    def inputs(self, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return c_in x_t and the time that the process tells, which is c_noise for EDM's own."""
        return self._factors(level)[0] * x_t, level.time

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """Return (x_0 - c_skip x_t) / c_out, written without a division by sigma."""
        scale = self._factors(level)[0]
        return scale * (level.sigma * x0 / self.sigma_data - level.alpha * self.sigma_data * eps)

    def denoised(self, output: Tensor, x_t: Tensor, level: Level) -> Denoised:
        """Read the output as F."""
        c_in, c_skip, c_out = self._factors(level)
        # eps = (x_t - alpha x_0) / sigma, in which sigma cancels
        eps = c_in * (level.sigma * c_in * x_t - level.alpha * self.sigma_data * output)
        return Denoised(c_skip * x_t + c_out * output, eps)
