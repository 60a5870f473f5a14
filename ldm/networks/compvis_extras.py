"""Networks that CompVis' code has but none of its released models: readable configs, recorded numbers, nothing more.

The U-Net of DDPM (Ho et al. 2020, arXiv 2006.11239), small decoders, encoder/decoder pairs whose latents are resized by
any factor, and the classifier of noisy latents for guidance (Dhariwal, Nichol 2021).
Legend: B batch, C channels, f downsampling factor, h features, t diffusion time, temb embedded time, z latent.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.attention import AttentionPool2d
from ldm.networks.embeddings import timestep_embedding
from ldm.networks.encoder_decoder import (
    GROUP_NORM_EPS,
    Architecture,
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    Level,
    Middle,
    ResnetBlock,
    Upsample,
)
from ldm.networks.layers import GroupNorm32, activated, conv, zeroed
from ldm.networks.unet import BlockFactory, UNetOptions, down_path, time_mlp

Pool: TypeAlias = Literal["adaptive", "attention", "spatial", "spatial_v2"]
_POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
_ADAPTIVE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_HIDDEN = 2048  # width of the perceptron of pool "spatial"


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed times (B,) as [sin, cos] of dim // 2 frequencies, 1 down to 1e-4: (B, dim) float32, an odd dim ends in 0.

    Unlike `timestep_embedding`: sine first, and both end points included. Raises ValueError for dim < 4.
    """
    if dim < 4:
        raise ValueError(f"sinusoidal_embedding: dim {dim} has fewer than two frequencies; use 4 or more")
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * exponents)
    angles = t.float()[:, None] * frequencies  # (B, half)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


class DiffusionModel(nn.Module):
    """Denoise images with the U-Net of DDPM; without time if not use_timestep. z_channels of arch plays no part."""

    def __init__(self, arch: Architecture, use_timestep: bool = True) -> None:
        super().__init__()
        self.use_timestep = use_timestep
        self.channels = arch.channels
        temb_channels = 4 * arch.channels
        if use_timestep:
            self.temb = nn.Module()
            self.temb.dense = nn.ModuleList(
                [nn.Linear(arch.channels, temb_channels), nn.Linear(temb_channels, temb_channels)]
            )
        self.conv_in = nn.Conv2d(arch.in_channels, arch.channels, 3, padding=1)
        widths = arch.level_channels
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            entering = widths[i - 1] if i else arch.channels
            pairs = [(entering, width)] + [(width, width)] * (arch.num_res_blocks - 1)
            self.down.append(_level(arch, i, pairs, temb_channels))
            if i < len(widths) - 1:
                self.down[i].downsample = Downsample(width, arch.resample_with_conv)
        self.mid = Middle(widths[-1], arch.attention, arch.dropout, temb_channels)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            entering = widths[i - 1] if i else arch.channels
            # Each block takes one skip: as wide as this level, the last as wide as what entered it on the way down.
            skips = [width] * arch.num_res_blocks + [entering]
            inputs = [widths[min(i + 1, len(widths) - 1)]] + [width] * arch.num_res_blocks
            pairs = [(a + skip, width) for a, skip in zip(inputs, skips, strict=True)]
            self.up.append(_level(arch, i, pairs, temb_channels))
            if i > 0:
                self.up[i].upsample = Upsample(width, arch.resample_with_conv)
        self.norm_out = GroupNorm32(widths[0], eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], arch.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, H, W) at times t (B,) to (B, out_channels, H, W); context joins x as channels."""
        x = x if context is None else torch.cat([x, context], dim=1)
        temb = self._embed(t)
        skips = [self.conv_in(x)]
        for i, level in enumerate(self.down):
            for j in range(len(level.block)):
                skips.append(level.step(j, skips[-1], temb))
            if i < len(self.down) - 1:
                skips.append(level.downsample(skips[-1]))
        h = self.mid(skips[-1], temb)
        for i in reversed(range(len(self.up))):
            for j in range(len(self.up[i].block)):
                h = self.up[i].step(j, torch.cat([h, skips.pop()], dim=1), temb)
            if i > 0:
                h = self.up[i].upsample(h)
        return self.conv_out(activated(self.norm_out, h))

    def _embed(self, t: Tensor | None) -> Tensor | None:
        if not self.use_timestep:
            return None
        if t is None:
            raise ValueError("DiffusionModel: t is missing; give times, or build it with use_timestep=False")
        first, second = self.temb.dense
        return second(F.silu(first(sinusoidal_embedding(t, self.channels).to(first.weight.dtype))))


def _level(arch: Architecture, i: int, widths: Sequence[tuple[int, int]], temb_channels: int) -> Level:
    return Level(widths, arch.attention if arch.has_attention(i) else None, arch.dropout, temb_channels)


class SimpleDecoder(nn.Module):
    """Decode features to an image of twice their size, without attention."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                nn.Conv2d(in_channels, in_channels, 1),
                ResnetBlock(in_channels, 2 * in_channels),
                ResnetBlock(2 * in_channels, 4 * in_channels),
                ResnetBlock(4 * in_channels, 2 * in_channels),
                nn.Conv2d(2 * in_channels, in_channels, 1),
                Upsample(in_channels),
            ]
        )
        self.norm_out = GroupNorm32(in_channels, eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, 2H, 2W)."""
        for layer in self.model:
            x = layer(x)
        return self.conv_out(activated(self.norm_out, x))


class UpsampleDecoder(nn.Module):
    """Decode features by residual blocks, doubling the size between the levels of channel_mult."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[int] = (2, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList()
        self.upsample_blocks = nn.ModuleList()
        width = in_channels
        for i, mult in enumerate(channel_mult):
            blocks = nn.ModuleList([ResnetBlock(width, channels * mult, dropout)])
            width = channels * mult
            blocks.extend(ResnetBlock(width, width, dropout) for _ in range(num_res_blocks))
            self.res_blocks.append(blocks)
            if i < len(channel_mult) - 1:
                self.upsample_blocks.append(Upsample(width))
        self.norm_out = GroupNorm32(width, eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H * 2^k, W * 2^k) with k = len(channel_mult) - 1."""
        for i, blocks in enumerate(self.res_blocks):
            for block in blocks:
                x = block(x)
            if i < len(self.upsample_blocks):
                x = self.upsample_blocks[i](x)
        return self.conv_out(activated(self.norm_out, x))


class LatentRescaler(nn.Module):
    """Resize features by `factor` (nearest) between `depth` residual blocks on either side."""

    def __init__(self, factor: float, in_channels: int, mid_channels: int, out_channels: int, depth: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.conv_in = nn.Conv2d(in_channels, mid_channels, 3, padding=1)
        self.res_block1 = nn.ModuleList(ResnetBlock(mid_channels) for _ in range(depth))
        self.attn = AttnBlock(mid_channels)
        self.res_block2 = nn.ModuleList(ResnetBlock(mid_channels) for _ in range(depth))
        self.conv_out = nn.Conv2d(mid_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, round(factor * H), round(factor * W))."""
        x = self.conv_in(x)
        for block in self.res_block1:
            x = block(x)
        height, width = (round(side * self.factor) for side in x.shape[-2:])
        x = self.attn(F.interpolate(x, size=(height, width), mode="nearest"))
        for block in self.res_block2:
            x = block(x)
        return self.conv_out(x)


class MergedRescaleEncoder(nn.Module):
    """Encode, then rescale: latents of out_channels at rescale_factor / f. z_channels of arch plays no part."""

    def __init__(
        self, arch: Architecture, out_channels: int, rescale_factor: float = 1.0, rescale_module_depth: int = 1
    ) -> None:
        super().__init__()
        width = arch.level_channels[-1]
        self.encoder = Encoder(replace(arch, z_channels=width), double_z=False)
        self.rescaler = LatentRescaler(rescale_factor, width, width, out_channels, rescale_module_depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H * factor / f, W * factor / f)."""
        return self.rescaler(self.encoder(x))


class MergedRescaleDecoder(nn.Module):
    """Rescale latents of arch.z_channels, then decode."""

    def __init__(self, arch: Architecture, rescale_factor: float = 1.0, rescale_module_depth: int = 1) -> None:
        super().__init__()
        width = arch.z_channels * arch.channel_mult[-1]
        self.decoder = Decoder(replace(arch, z_channels=width))
        self.rescaler = LatentRescaler(rescale_factor, arch.z_channels, width, width, rescale_module_depth)

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, z_channels, h, w) to (B, out_channels, h * factor * f, w * factor * f)."""
        return self.decoder(self.rescaler(z))


class EncoderUNet(nn.Module):
    """Map a noisy latent and its time to logits of its class.

    `pool`: "adaptive" mean of the last features; "attention" pooling of them (needs image_size and num_head_channels);
    "spatial", "spatial_v2": a perceptron on the means of every block's output. Without num_heads and num_head_channels
    attention has one head.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        image_size: int | None = None,
        num_res_blocks: int = 2,
        attention_factors: Sequence[int] = (8, 4, 2),
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        pool: Pool = "adaptive",
        options: UNetOptions = UNetOptions(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__()
        if pool not in _POOLS:
            raise UserError(f"EncoderUNet: pool={pool!r} is unknown; choose one of {', '.join(_POOLS)}")
        self.model_channels = model_channels
        self.pools_all_blocks = pool.startswith("spatial")
        widths = [model_channels * mult for mult in channel_mult]
        factory = BlockFactory(model_channels, num_heads, num_head_channels, options)
        self.time_embed = time_mlp(model_channels)
        self.input_blocks, outputs = down_path(factory, in_channels, widths, num_res_blocks, attention_factors)
        self.middle_block = factory.middle(outputs[-1])
        if pool == "adaptive":
            self.out = _mean_head(outputs[-1], out_channels, options.dims)
        elif pool == "attention":
            if image_size is None or num_head_channels is None:
                raise UserError("EncoderUNet: pool='attention' needs image_size and num_head_channels")
            size = image_size // 2 ** (len(channel_mult) - 1)
            pooling = AttentionPool2d(size, outputs[-1], num_head_channels, out_channels)
            self.out = nn.Sequential(GroupNorm32(outputs[-1]), nn.SiLU(), pooling)
        else:
            self.out = _perceptron_head(sum(outputs) + outputs[-1], out_channels, normalised=pool == "spatial_v2")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return logits (B, out_channels) in the dtype of x, for x (B, in_channels, H, W) at steps t (B,)."""
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype))
        h, means = x.to(dtype), []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            if self.pools_all_blocks:
                means.append(h.flatten(2).mean(dim=-1))  # (B, C)
        return self.out(torch.cat(means, dim=-1) if self.pools_all_blocks else h).to(x.dtype)


def _mean_head(channels: int, out_channels: int, dims: int) -> nn.Sequential:
    return nn.Sequential(
        GroupNorm32(channels),
        nn.SiLU(),
        _ADAPTIVE_POOLS[dims](1),
        zeroed(conv(dims, channels, out_channels, 1)),
        nn.Flatten(),
    )


def _perceptron_head(features: int, out_channels: int, normalised: bool) -> nn.Sequential:
    middle = (GroupNorm32(_HIDDEN), nn.SiLU()) if normalised else (nn.ReLU(),)
    return nn.Sequential(nn.Linear(features, _HIDDEN), *middle, nn.Linear(_HIDDEN, out_channels))
