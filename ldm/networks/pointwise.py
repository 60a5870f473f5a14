"""Convolutions of kernel size 1, computed as the linear maps that they are, and maps as sequences of tokens.

y = W x + b at every position. A matrix product over channels_last positions is faster than the kernels of convolutions,
and published parameter names and shapes stay those of a convolution.
Legend: B batch, C and C' channels, N positions.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def to_tokens(x: Tensor) -> Tensor:
    """Flatten the spatial axes: (B, C, ...) -> (B, N, C), contiguous; a view if x is channels_last."""
    return rearrange(x, "b c ... -> b (...) c").contiguous()


def from_tokens(tokens: Tensor, like: Tensor) -> Tensor:
    """Undo `to_tokens` for a map with the spatial axes of `like`: (B, N, C) -> (B, C, ...), always a view."""
    return rearrange(tokens, "b n c -> b c n").unflatten(2, like.shape[2:])


class PointwiseConv1d(nn.Conv1d):
    """Convolve with kernel size 1: (B, C, N) -> (B, C', N), channels last in memory."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return _over_channels(x, self.weight, self.bias)


class PointwiseConv2d(nn.Conv2d):
    """Convolve with kernel size 1: (B, C, H, W) -> (B, C', H, W), channels_last."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return _over_channels(x, self.weight, self.bias)


def _over_channels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Contiguous tokens: a linear map of strided ones would copy them too, and add its bias in a second pass.
    return from_tokens(F.linear(to_tokens(x), weight.flatten(1), bias), x)
