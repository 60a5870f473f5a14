"""The training loss: weighted error, learned uncertainty of each step, and variational term.

L = w_simple mean(w(level_i) l_i / exp(s_t) + s_t) + w_elbo mean(v_t l_i), with l_i the mean error of sample i, w the
weighting, s_t a log variance of each step (0 unless learned; Kendall & Gal) and v_t the weights of the variational
bound (DDPM, eq. 12). Learned variances and the variational term need the steps of a discrete process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.bounds import NonNegative
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.process import Level, Process
from ldm.diffusion.times import TimeDensity, Uniform
from ldm.diffusion.weighting import Unit, Weighting
from ldm.errors import UserError


class Terms(NamedTuple):
    """The total loss, the error of each sample (B,), and the unweighted VLB and uncertainty terms (scalars).

    vlb is None for a process without steps.
    """

    loss: Tensor
    simple: Tensor
    vlb: Tensor | None
    gamma: Tensor


def _absolute(difference: Tensor) -> Tensor:
    return difference.abs()


def _square(difference: Tensor) -> Tensor:
    return difference**2


ERRORS: dict[str, Callable[[Tensor], Tensor]] = {"l1": _absolute, "l2": _square}


class Objective(nn.Module):
    """The loss of a diffusion model, and the density of the times at which it is taken.

    Before its first use it is bound to a process and a prediction, whose tables it then holds; only a learned `logvar`
    (T,) is part of its state.
    """

    def __init__(
        self,
        loss: str = "l2",
        weighting: Weighting | None = None,
        times: TimeDensity | None = None,
        simple_weight: NonNegative = 1.0,
        elbo_weight: NonNegative = 0.0,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
    ) -> None:
        """Describe the loss. UserError for an unknown error.

        Args:
            loss: Error of an entry, "l1" or "l2".
            weighting: Weight of a sample by its level (default: 1).
            times: Density of the training times (default: uniform).
            simple_weight: Weight of the first term.
            elbo_weight: Weight of the variational term; needs a discrete process.
            learn_logvar: Learn a log variance for each step; needs a discrete process.
            logvar_init: First value of these log variances, or the constant one.
        """
        super().__init__()
        if loss not in ERRORS:
            raise UserError(f"objective: loss '{loss}' is unknown; use one of {', '.join(ERRORS)}")
        self.error = ERRORS[loss]
        self.weighting, self.times = weighting or Unit(), times or Uniform()
        self.simple_weight, self.elbo_weight = simple_weight, elbo_weight
        self.learn_logvar, self.logvar_init = learn_logvar, float(logvar_init)

    def bind(self, process: Process, prediction: Prediction) -> Objective:
        """Make the tables for a process and a prediction. UserError for terms that the process cannot have."""
        self.times.check(process)
        steps = process.num_steps
        for is_used, name in ((self.elbo_weight, "elbo_weight"), (self.learn_logvar, "learn_logvar")):
            if is_used and steps is None:
                kind = type(process).__name__
                raise UserError(f"objective: {name} needs the steps of a discrete process, and {kind} has none")
        self.prediction = prediction
        weights = None if steps is None else vlb_weights(process, prediction)
        self.register_buffer("vlb_weights", weights, persistent=False)
        logvar = torch.full((steps or 1,), self.logvar_init)
        if self.learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        return self

    def forward(self, output: Tensor, target: Tensor, level: Level) -> Terms:
        """Compare output and target (B, C, H, W) of the network at these levels, in float32 or wider."""
        wider = torch.promote_types(output.dtype, torch.float32)
        simple = self.error(output.to(wider) - target.to(wider)).flatten(1).mean(1)  # (B,)
        weighted = simple * self.weighting(level, self.prediction)
        if self.vlb_weights is None:
            gamma = (weighted / self.logvar.exp() + self.logvar).mean()
            return Terms(self.simple_weight * gamma, simple, None, gamma)
        steps = level.time.long()
        logvar = self.logvar[steps]
        gamma, vlb = (weighted / logvar.exp() + logvar).mean(), (self.vlb_weights[steps] * simple).mean()
        loss = self.simple_weight * gamma
        if self.elbo_weight:
            loss = loss + self.elbo_weight * vlb
        return Terms(loss, simple, vlb, gamma)


def vlb_weights(process: DiscreteVP, prediction: Prediction) -> Tensor:
    """Return the weights (T,) of the squared error of the output in the variational bound, that of step 0 as of step 1.

    DDPM, eq. 12, converted from eps to what is predicted.
    """
    eps_weights = process.vlb_weights()
    level = process.level(torch.arange(process.num_steps, device=eps_weights.device))
    weights = prediction.vlb_weights(eps_weights, level).clone()
    weights[0] = weights[1] if len(weights) > 1 else 0.0
    return weights
