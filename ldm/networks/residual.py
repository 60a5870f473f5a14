"""The U-Net's residual blocks, conditioned on the timestep, and its changes of resolution (Dhariwal, Nichol 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.networks.layers import GroupNorm32, activated, average_pool, conv, recompute, zeroed


def _stride(dims: int) -> int | tuple[int, int, int]:
    """Return the stride that halves every axis, in three dimensions all but the first."""
    return (1, 2, 2) if dims == 3 else 2


class Upsample(nn.Module):
    """Double the resolution by repetition, then convolve if asked: (B, C, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, channels: int, use_conv: bool = True, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.factors = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        out_channels = channels if out_channels is None else out_channels
        if use_conv:
            self.conv = conv(dims, channels, out_channels, 3, padding=1)
        self.use_conv = use_conv

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.factors, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution (padding 1 on all sides) or by averaging.

    (B, C, H, W) -> (B, out_channels, ceil(H/2), ceil(W/2)); averaging keeps C and rounds down.
    """

    def __init__(self, channels: int, use_conv: bool = True, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        if use_conv:
            self.op = conv(dims, channels, out_channels, 3, stride=_stride(dims), padding=1)
        else:
            self.op = average_pool(dims, _stride(dims))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding in between, residual; the last one begins at zero.

    x (B, channels, H, W), emb (B, emb_channels) -> (B, out_channels or channels, H, W); with `up` or `down` the input's
    resolution is doubled or halved between the first activation and the first convolution.
    The embedding is added, or with `use_scale_shift_norm` scales and shifts the second normalisation.
    `use_conv` makes the skip connection 3x3 where the number of channels changes.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.checkpoint = checkpoint
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), conv(dims, channels, out_channels, 3, padding=1)
        )
        self.resample: nn.Module = nn.Identity()
        if up:
            self.resample = Upsample(channels, use_conv=False, dims=dims)
        elif down:
            self.resample = Downsample(channels, use_conv=False, dims=dims)
        emb_width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(conv(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection: nn.Module = nn.Identity()
        else:
            kernel_size = 3 if use_conv else 1
            self.skip_connection = conv(dims, channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return recompute(self.checkpoint, self._forward, x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(self.resample(activated(norm, x, activation)))
        emb = self.emb_layers(emb).to(h.dtype)
        emb = emb.reshape(*emb.shape, *(1,) * (h.ndim - 2))  # (B, C', 1, 1)
        norm, activation, dropout, convolution = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = activation(torch.addcmul(shift, norm(h), 1 + scale))
        else:
            h = activated(norm, h + emb, activation)
        return self.skip_connection(self.resample(x)) + convolution(dropout(h))
