"""How the weights are optimised: AdamW, or another optimiser, with a learning-rate multiplier per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.bounds import NonNegative
from ldm.errors import ConfigError, UserError, shown

Multiplier = Callable[[int], float]
MakeOptimizer = Callable[..., Optimizer]  # from parameters or groups of them, `params`, and a learning rate, `lr`
Group = dict[str, Any]
_OF_ADAMW = ("betas", "eps", "weight_decay")


@dataclass(frozen=True)
class Optimization:
    """Set AdamW (defaults as published) and the learning-rate multiplier per optimiser step (None: constant).

    `gradient_clip` bounds the norm of the gradient of all parameters together; the trainer's own setting wins.
    `optimizer` is another one in place of AdamW: in YAML a node of its class, such as torch.optim.Muon. UserError for
    settings of AdamW beside it.
    """

    betas: tuple[NonNegative, NonNegative] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: NonNegative = 0.01
    schedule: Multiplier | None = None
    gradient_clip: NonNegative | None = None
    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        changed = [name for name in _OF_ADAMW if _plain(getattr(self, name)) != defaults[name]]
        if self.optimizer is not None and changed:
            raise UserError(f"{changed[0]}: is AdamW's; give it to the optimizer, and leave it out beside it")

    def build(self, groups: list[Group], learning_rate: float, fused: bool) -> Optimizer:
        """Build the optimiser; only AdamW is fused, or chooses by the device. UserError for one that does not fit."""
        if self.optimizer is not None:
            return build_optimizer(self.optimizer, groups, learning_rate)
        settings = {"betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}
        return AdamW(groups, lr=learning_rate, fused=fused or None, **settings)  # False would rule out foreach too

    def scheduler(self, optimizer: Optimizer) -> LambdaLR | None:
        """Build the scheduler; its state holds numbers only, so that checkpoints stay plain."""
        return scheduler(optimizer, self.schedule)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def build_optimizer(make: MakeOptimizer, groups: list[Group], learning_rate: float) -> Optimizer:
    """Build an optimiser, after a step on a matrix has shown that it makes one from dense gradients in one pass.

    UserError for one that does not.
    """
    first = groups[0]["params"][0]
    probe = nn.Parameter(torch.zeros(2, 2, device=first.device))
    probe.grad = torch.ones_like(probe)
    optimizer = make(params=[probe], lr=learning_rate)
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        reason = shown(f"{type(error).__name__}: {error}", 120)
        raise UserError(f"optimizer: {type(optimizer).__name__} cannot train these networks ({reason})") from error
    try:
        return make(params=groups, lr=learning_rate)
    except ConfigError as error:
        raise ConfigError(f"{error.problem}; choose others by train, or train an adapter", error.path) from error


def group_by_rate(named: Mapping[str, nn.Parameter], factors: Mapping[str, float], learning_rate: float) -> list[Group]:
    """Return groups of parameters with the same factor (by name, else 1) and their rates, those of factor 1 first."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named.items():
        groups.setdefault(factors.get(name, 1.0), []).append(parameter)
    return [{"params": members, "lr": learning_rate * factor} for factor, members in groups.items() if members]


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


def clip_gradients(
    parts: Iterable[Iterable[nn.Parameter]], largest: float | None, algorithm: str | None = None
) -> None:
    """Clip each part's gradients on its own: their common norm, or with "value" each entry; None or 0 clips nothing.

    Done here since Lightning refuses to clip for a fused optimiser under bf16-mixed, where nothing forbids it.
    """
    if not largest:
        return
    clip = nn.utils.clip_grad_value_ if algorithm == "value" else nn.utils.clip_grad_norm_
    for parameters in parts:
        clip(parameters, largest)
