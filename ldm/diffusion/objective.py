"""The training loss: simple term, learned per-step uncertainty, and variational term.

L = w_simple * mean(l_i / exp(s_t) + s_t) + w_elbo * mean(w_t l_i), with l_i the mean error of sample i, s_t a log
variance per step (0 unless learned; Kendall & Gal) and w_t the VLB weights (DDPM eq. 12).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import UserError


class Terms(NamedTuple):
    """Hold the total loss, the error of each sample (B,), and the unweighted VLB and uncertainty terms (scalars)."""

    loss: Tensor
    simple: Tensor
    vlb: Tensor
    gamma: Tensor


def _absolute(difference: Tensor) -> Tensor:
    return difference.abs()


def _square(difference: Tensor) -> Tensor:
    return difference**2


ERRORS: dict[str, Callable[[Tensor], Tensor]] = {"l1": _absolute, "l2": _square}


@dataclass(frozen=True)
class Objective:
    """Weigh the terms of the loss. UserError for an unknown `loss`."""

    loss: str = "l2"
    simple_weight: float = 1.0
    elbo_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in ERRORS:
            raise UserError(f"objective: loss '{self.loss}' is unknown; use one of {', '.join(ERRORS)}")

    def __call__(self, output: Tensor, target: Tensor, t: Tensor, *, vlb_weights: Tensor, logvar: Tensor) -> Terms:
        """Compare output and target (B, C, H, W) at steps t (B,), in float32 or wider; the tables are (T,)."""
        difference = output.to(wider := torch.promote_types(output.dtype, torch.float32)) - target.to(wider)
        simple = ERRORS[self.loss](difference).flatten(1).mean(1)  # (B,)
        logvar_t = logvar[t]
        gamma = (simple / logvar_t.exp() + logvar_t).mean()
        vlb = (vlb_weights[t] * simple).mean()
        loss = self.simple_weight * gamma
        if self.elbo_weight:
            loss = loss + self.elbo_weight * vlb
        return Terms(loss, simple, vlb, gamma)
