"""The training loss: weighted error, learned uncertainty of each step or level, and variational term.

L = w_simple mean(w(level_i) l_i / exp(s_i) + s_i) + w_elbo mean(v_t l_i), with l_i the mean error of sample i, w the
weighting, s_i a log variance of its step or level (0 unless learned; Kendall & Gal; Karras et al., arXiv 2312.02696,
eq. 21) and v_t the weights of the variational bound (DDPM, eq. 12). Log variances of steps and the variational term
need the steps of a discrete process. The error is that of the output, or measured in another space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.bounds import NonNegative, Size
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.prediction import Prediction, error_in
from ldm.diffusion.process import Level, Process, per_sample
from ldm.diffusion.times import Stratified, TimeDensity, Uniform
from ldm.diffusion.weighting import VLB, Unit, Weighting
from ldm.errors import UserError

_VARIANCE_WEIGHT = 1e-3  # arXiv 2102.09672, section 3.1
_LARGEST = 10.0  # of log(sigma / alpha) / 4, where there is no signal


class Terms(NamedTuple):
    """The total loss, the error of each sample (B,), and the unweighted VLB and uncertainty terms (scalars).

    vlb is None for a process without steps; variance is the term of a learned variance (scalar), if there is one.
    """

    loss: Tensor
    simple: Tensor
    vlb: Tensor | None
    gamma: Tensor
    variance: Tensor | None = None


Error = Callable[[Tensor], Tensor]  # of entries


def _absolute(difference: Tensor) -> Tensor:
    return difference.abs()


def _square(difference: Tensor) -> Tensor:
    return difference**2


@dataclass(frozen=True)
class Huber:
    """Half the square of differences up to `delta`, and linear beyond (Huber 1964). UserError unless delta > 0."""

    delta: float = 1.0

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise UserError(f"objective: delta of Huber is {self.delta}; it must be above 0")

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the errors of entries."""
        return F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=self.delta)


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(d^2 + c^2) - c, smooth at 0 and nearly |d| beyond c (Charbonnier et al. 1997). UserError unless c > 0."""

    c: float = 1e-3

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise UserError(f"objective: c of PseudoHuber is {self.c}; it must be above 0")

    def __call__(self, difference: Tensor) -> Tensor:
        """Return the errors of entries."""
        return (difference**2 + self.c**2).sqrt() - self.c


ERRORS: dict[str, Error] = {"l1": _absolute, "l2": _square, "huber": Huber(), "pseudo_huber": PseudoHuber()}


def error_of(loss: str | Error) -> Error:
    """Return an error by its name, or the error itself. UserError for a name that does not exist."""
    if isinstance(loss, str) and loss not in ERRORS:
        raise UserError(f"objective: loss '{loss}' is unknown; use one of {', '.join(ERRORS)}")
    return ERRORS[loss] if isinstance(loss, str) else loss


class Uncertainty(nn.Module):
    """A learned log variance u(level) of the error, smooth in the level (Karras et al., arXiv 2312.02696, section 2.3).

    A linear layer on fixed random waves of log(sigma / alpha); it begins at 0, where the loss is the plain one.
    """

    def __init__(self, channels: Size = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same whatever was drawn before
        waves, phases = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator)
        self.register_buffer("waves", 2 * math.pi * waves)
        self.register_buffer("phases", 2 * math.pi * phases)
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, level: Level) -> Tensor:
        """Return u (B,)."""
        place = (-level.log_snr / 8).clamp(-_LARGEST, _LARGEST).flatten()[:, None].to(self.waves)  # log(s) / 4
        return (place * self.waves + self.phases).cos() @ self.weight * (2 / len(self.weight)) ** 0.5


class Draws(Protocol):
    """Draw for samples of these numbers, int64 (B,), each from its own stream."""

    numbers: Tensor

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Return standard normals."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Return uniforms in [0, 1)."""


class Objective(nn.Module):
    """The loss of a diffusion model, and the density of the times at which it is taken.

    Before its first use it is bound to a process and a prediction, whose tables it then holds; only a learned `logvar`
    (T,) and `uncertainty` are part of its state.
    """

    def __init__(
        self,
        loss: str | Error = "l2",
        weighting: Weighting | None = None,
        times: TimeDensity | None = None,
        simple_weight: NonNegative = 1.0,
        elbo_weight: NonNegative = 0.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        space: Prediction | None = None,
        offset_noise: NonNegative = 0.0,
        uncertainty: Uncertainty | None = None,
        variance_weight: NonNegative | None = None,
    ) -> None:
        """Describe the loss. UserError for an unknown error, and for what would have no effect.

        Args:
            loss: Error of an entry, "l1", "l2", "huber", "pseudo_huber", or a function such as `Huber(0.1)`.
            weighting: Weight of a sample by its level (default: 1).
            times: Density of the training times (default: uniform).
            simple_weight: Weight of the first term.
            elbo_weight: Weight of the variational term; needs a discrete process.
            learn_logvar: Learn a log variance for each step; needs a discrete process.
            logvar_init: First value of these log variances, or the constant one.
            space: Prediction in which the error is measured (default: what the network predicts).
            offset_noise: Standard deviation of noise, in training, that all places of a channel share.
            uncertainty: Learned log variance of each level, for any process.
            variance_weight: Weight of the variational bound, by which a network with twice the channels learns the
                variance of ancestral steps, the hybrid loss (default: 0.001).
        """
        super().__init__()
        if uncertainty is not None and learn_logvar:
            raise UserError("objective: learn_logvar and uncertainty learn the same; leave one of them out")
        if uncertainty is not None and logvar_init:
            raise UserError("objective: logvar_init has no effect beside uncertainty; leave one of them out")
        if simple_weight == 0 and (weighting is not None or uncertainty is not None):
            name = "uncertainty" if weighting is None else "weighting"
            raise UserError(f"objective: {name} has no effect with simple_weight 0; give it another weight")
        self.error = error_of(loss)
        self.weighting, self.times = weighting or Unit(), times or Uniform()
        self.simple_weight, self.elbo_weight = simple_weight, elbo_weight
        self.learn_logvar, self.logvar_init = learn_logvar, float(logvar_init)
        self.space, self.offset_noise, self.uncertainty = space, offset_noise, uncertainty
        self.variance_weight = variance_weight

    def bind(self, process: Process, prediction: Prediction) -> Objective:
        """Make the tables for a process and a prediction. UserError for terms that the process cannot have."""
        self.times.check(process)
        steps = process.num_steps
        for is_used, name, instead in (
            (self.elbo_weight, "elbo_weight", "weighting: VLB"),
            (self.learn_logvar, "learn_logvar", "uncertainty"),
        ):
            if is_used and steps is None:
                kind = type(process).__name__
                problem = f"{name} needs the steps of a discrete process, and {kind} has none"
                raise UserError(f"objective: {problem}; {instead} takes any process")
        if isinstance(self.weighting, VLB):
            self.weighting = self.weighting.bound(process, self.times)
        self.prediction = prediction
        weights = None if steps is None else vlb_weights(process, self.space or prediction)
        self.register_buffer("vlb_weights", weights, persistent=False)
        logvar = torch.full((steps or 1,), self.logvar_init)
        if self.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        return self

    def with_variance(self, terms: Terms, nats: Tensor) -> Terms:
        """Add the term of a learned variance, `variance_nats`."""
        weight = _VARIANCE_WEIGHT if self.variance_weight is None else self.variance_weight
        return terms._replace(loss=terms.loss + weight * nats, variance=nats)

    def draw_times(self, draws: Draws, count: int, process: Process) -> Tensor:
        """Return the training times (B,) of `count` samples."""
        u = draws.uniform((count,))
        return self.times(self.times.spread(u, draws.numbers) if isinstance(self.times, Stratified) else u, process)

    def draw_noise(self, draws: Draws, shape: tuple[int, ...]) -> Tensor:
        """Return the noise of training (B, c, h, w), with the offset of each channel."""
        noise = draws.normal(shape)
        if self.offset_noise:
            noise = noise + self.offset_noise * draws.normal((*shape[:2], 1, 1))
        return noise

    def forward(self, output: Tensor, target: Tensor, level: Level) -> Terms:
        """Compare output and target (B, C, H, W) of the network at these levels, in float32 or wider."""
        wider = torch.promote_types(output.dtype, torch.float32)
        difference = output.to(wider) - target.to(wider)
        if self.space is not None:
            difference = difference * error_in(self.space, self.prediction, level)
        simple = self.error(difference).flatten(1).mean(1)  # (B,)
        weighted = simple * self.weighting(level, self.space or self.prediction)
        steps = None if self.vlb_weights is None else level.time.long()
        if self.uncertainty is not None:
            logvar = self.uncertainty(level)
        else:
            logvar = self.logvar if steps is None else self.logvar[steps]
        gamma = (weighted / logvar.exp() + logvar).mean()
        loss = self.simple_weight * gamma
        if steps is None:
            return Terms(loss, simple, None, gamma)
        vlb = (self.vlb_weights[steps] * simple).mean()
        if self.elbo_weight:
            loss = loss + self.elbo_weight * vlb
        return Terms(loss, simple, vlb, gamma)


def variance_nats(process: DiscreteVP, share: Tensor, x0: Tensor, x_t: Tensor, guess: Tensor, t: Tensor) -> Tensor:
    """Return the variational bound of ancestral steps with learned variances, in nats a dimension, T steps together.

    arXiv 2102.09672, section 3.1: KL of q(x_{t-1} | x_t, x_0) from the step that a network makes with mean q(. | guess)
    and, between the bounds of its logarithm, variance by `share`; at step 0 the negative log-likelihood of x_0. All
    (B, C, H, W), t (B,) whole steps; `guess` without gradient, so that only the variance learns from it.
    """
    true, made = process.posterior(x0, x_t, t), process.posterior(guess, x_t, t)
    smallest = process.at("posterior_log_variance_clipped", t.clamp(min=min(1, process.num_steps - 1)))
    log_variance = smallest + share * (process.at("betas", t).log() - smallest)
    square = (true.mean - made.mean) ** 2
    kl = log_variance - true.log_variance + (true.variance + square) / log_variance.exp() - 1
    likelihood = math.log(2 * math.pi) + log_variance + (x0 - made.mean) ** 2 / log_variance.exp()
    return process.num_steps / 2 * torch.where(per_sample(t == 0), likelihood, kl).mean()


def vlb_weights(process: DiscreteVP, prediction: Prediction) -> Tensor:
    """Return the weights (T,) of the squared error of the output in the variational bound, that of step 0 as of step 1.

    DDPM, eq. 12, converted from eps to what is predicted.
    """
    eps_weights = process.vlb_weights()
    level = process.level(torch.arange(process.num_steps, device=eps_weights.device))
    weights = prediction.vlb_weights(eps_weights, level).clone()
    weights[0] = weights[1] if len(weights) > 1 else 0.0
    return weights
