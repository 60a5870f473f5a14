"""How the weights are optimised: AdamW with a learning-rate multiplier per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.bounds import NonNegative

Multiplier = Callable[[int], float]


@dataclass(frozen=True)
class Optimization:
    """Set AdamW (defaults as published) and the learning-rate multiplier per optimiser step (None: constant).

    `gradient_clip` bounds the norm of the gradient of all parameters together; the trainer's own setting wins.
    """

    betas: tuple[NonNegative, NonNegative] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: NonNegative = 0.01
    schedule: Multiplier | None = None
    gradient_clip: NonNegative | None = None

    def adamw(self, parameters: list[nn.Parameter], learning_rate: float, fused: bool) -> AdamW:
        """Build the optimiser."""
        settings = {"betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}
        return AdamW(parameters, lr=learning_rate, fused=fused, **settings)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR | None:
        """Build the scheduler; its state holds numbers only, so that checkpoints stay plain."""
        return scheduler(optimizer, self.schedule)


def scheduler(optimizer: Optimizer, multiplier: Multiplier | None) -> LambdaLR | None:
    """Build a scheduler from a multiplier per step, or None."""
    if multiplier is None:
        return None
    return LambdaLR(optimizer, lambda step: multiplier(step))  # of an object, LambdaLR would pickle the fields


def stepwise(optimizer: Optimizer, steps: LambdaLR | None) -> dict[str, Any]:
    """Put an optimiser and its schedule, which moves once a step, in the form in which Lightning takes them."""
    if steps is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}


def clip_gradients(optimizer: Optimizer, largest: float | None, algorithm: str | None = None) -> None:
    """Clip each group's gradients on its own: their common norm, or with "value" each entry; None or 0 clips nothing.

    Done here since Lightning refuses to clip for a fused optimiser under bf16-mixed, where nothing forbids it.
    """
    if not largest:
        return
    clip = nn.utils.clip_grad_value_ if algorithm == "value" else nn.utils.clip_grad_norm_
    for group in optimizer.param_groups:
        clip(group["params"], largest)
