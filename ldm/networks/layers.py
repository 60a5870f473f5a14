"""What the blocks of networks share: normalisation, convolution by dimension, zero initialisation, recomputation.

`dims` is the number of spatial axes: 1, 2 (images) or 3 (video; the first axis is never resampled).
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError
from ldm.networks import fused_norm

NUM_GROUPS = 32
Module = TypeVar("Module", bound=nn.Module)
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Normalise over groups of channels, with float32 statistics whatever the input's dtype.

    (B, C, ...) -> (B, C, ...) in the dtype and memory format of the input, through SiLU if `activate`. UserError unless
    num_groups divides C.
    """

    def __init__(self, channels: int, eps: float = 1e-5, num_groups: int = NUM_GROUPS) -> None:
        if channels % num_groups:
            raise UserError(f"{channels} channels cannot be normalised: use a multiple of {num_groups} at every level")
        super().__init__(num_groups, channels, eps=eps)

    def forward(self, x: Tensor, activate: bool = False) -> Tensor:
        if fused_norm.takes(x):
            return fused_norm.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, activate)
        return fused_norm.by_torch(x, self.num_groups, self.weight, self.bias, self.eps, activate)


def activated(norm: nn.Module, x: Tensor, silu: nn.Module | None = None) -> Tensor:
    """Return SiLU of a normalised input, in one kernel where there is one and nothing hangs on the layers."""
    if fused_norm.takes(x) and isinstance(norm, GroupNorm32) and not (is_watched(norm) or is_watched(silu)):
        return norm(x, activate=True)
    y = norm(x)
    return F.silu(y) if silu is None else silu(y)


def is_watched(layer: nn.Module | None) -> bool:
    """Return whether hooks hang on a layer, which only a call of it runs."""
    return layer is not None and bool(layer._forward_hooks or layer._forward_pre_hooks)


def group_norm(channels: int, eps: float = 1e-5, num_groups: int | None = NUM_GROUPS) -> nn.Module:
    """Return a group norm; num_groups None: no normalisation."""
    return nn.Identity() if num_groups is None else GroupNorm32(channels, eps, num_groups)


def store_in_half(network: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights that autocast casts to `dtype` at each call in it: the same numbers, half of the memory.

    The network can then be called under that autocast alone.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            layer.to(dtype)


class LayerNorm32(nn.LayerNorm):
    """Normalise over the last axis, with float32 statistics, in the input's dtype: (..., C) -> (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm32(nn.RMSNorm):
    """Divide by the root mean square over the last axis, which is summed in float32: (..., C) -> (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # with a weight of another type, torch's is not fused
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def conv(dims: int, in_channels: int, out_channels: int, kernel_size: int, **options: object) -> nn.Module:
    """Return a convolution over `dims` spatial axes; `options` are those of torch's class."""
    return _CONVOLUTIONS[dims](in_channels, out_channels, kernel_size, **options)


def average_pool(dims: int, stride: int | tuple[int, ...]) -> nn.Module:
    """Return an average pooling over `dims` spatial axes with windows that do not overlap."""
    return _AVERAGE_POOLS[dims](kernel_size=stride, stride=stride)


def zeroed(module: Module) -> Module:
    """Return `module` with all parameters 0, so that a residual block begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def recompute(enabled: bool, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Return function(*inputs); if enabled, its activations are recomputed in the backward pass instead of kept."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
