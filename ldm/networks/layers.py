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

NUM_GROUPS = 32
Module = TypeVar("Module", bound=nn.Module)
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Normalise over groups of channels, with float32 statistics whatever the input's dtype.

    (B, C, ...) -> (B, C, ...) in the dtype and memory format of the input. UserError unless num_groups divides C.
    """

    def __init__(self, channels: int, eps: float = 1e-5, num_groups: int = NUM_GROUPS) -> None:
        if channels % num_groups:
            raise UserError(f"{channels} channels cannot be normalised: use a multiple of {num_groups} at every level")
        super().__init__(num_groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x).to(x.dtype)
        # The kernels accumulate half inputs in float32 themselves; left to autocast they would copy x to float32.
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def group_norm(channels: int, eps: float = 1e-5, num_groups: int | None = NUM_GROUPS) -> nn.Module:
    """Return a group norm; num_groups None: no normalisation."""
    return nn.Identity() if num_groups is None else GroupNorm32(channels, eps, num_groups)


class LayerNorm32(nn.LayerNorm):
    """Normalise over the last axis, with float32 statistics, in the input's dtype: (..., C) -> (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


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
