"""The convolutional encoder E and decoder D of the first stage: x -> h, z -> x (arXiv 2112.10752, Sec. 3.1, App. G).

Both are the residual networks of VQGAN: levels of resolution 1, 1/2, ..., 1/f with residual blocks, one single-head
attention at the lowest resolution, GroupNorm(32, eps 1e-6) and swish throughout. Child names and their order are those
of the published checkpoints. Legend: x image, h encoder features, z latent, f downsampling factor, temb embedded time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.bounds import Depth, Fraction, Levels, Size
from ldm.errors import UserError
from ldm.networks.attention import LinearAttention
from ldm.networks.attention import SpatialSelfAttention as AttnBlock
from ldm.networks.layers import NUM_GROUPS, activated, group_norm

GROUP_NORM_EPS = 1e-6  # released first stages; the U-Net has 1e-5
Attention = Literal["vanilla", "linear", "none"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of an encoder/decoder pair. UserError for values that no network can have.

    Args:
        channels: width of the first level.
        channel_mult: multiple of `channels` at each level; f = 2 ** (levels - 1).
        resolution: nominal side of the images; the actual input may have another size.
        attention_resolutions: sides, halved from `resolution` level by level, at which a level has attention.
        norm_groups: groups of the group norms. With as many groups as channels each channel, and so the colour, loses
            its mean: narrow networks need fewer than the published 32. Shallow ones work with None, no normalisation
            (arXiv 1707.02921).
    """

    in_channels: Size = 3
    out_channels: Size = 3
    channels: Size = 128
    channel_mult: Levels = (1, 2, 4)
    num_res_blocks: Depth = 2
    z_channels: Size = 3
    resolution: Size = 256
    attention_resolutions: tuple[Size, ...] = ()
    attention: Attention = "vanilla"
    dropout: Fraction = 0.0
    resample_with_conv: bool = True
    norm_groups: Size | None = NUM_GROUPS

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        if self.attention not in ("vanilla", "linear", "none"):
            raise UserError(f"Architecture.attention: {self.attention!r}; allowed are vanilla, linear, none")
        if not self.channel_mult:
            raise UserError("Architecture.channel_mult: empty; give one multiple per level, such as [1, 2, 4]")
        if self.num_res_blocks < 1:
            raise UserError(f"Architecture.num_res_blocks: {self.num_res_blocks}; give at least 1")
        for width in (self.channels, *self.level_channels):
            groups = 1 if self.norm_groups is None else self.norm_groups
            if width < 1 or groups < 1 or width % groups:
                raise UserError(
                    f"Architecture.channels: a level would have {width} channels; every level needs a multiple of "
                    f"norm_groups, {self.norm_groups}"
                )

    @property
    def factor(self) -> int:
        """Return the downsampling factor f."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Return the width of each level, highest resolution first."""
        return tuple(int(self.channels * mult) for mult in self.channel_mult)

    def has_attention(self, level: int) -> bool:
        """Return whether the blocks of this level are followed by attention."""
        return self.resolution // 2**level in self.attention_resolutions


class LinAttnBlock(LinearAttention):
    """Attend in linear time with one head as wide as the input; no norm and no residual, as published."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels, heads=1, head_channels=in_channels)


def make_attention(channels: int, attention: Attention, norm_groups: int | None = NUM_GROUPS) -> nn.Module:
    """Return the attention block of this kind; nn.Identity for "none"."""
    if attention == "none":
        return nn.Identity()
    return AttnBlock(channels, norm_groups) if attention == "vanilla" else LinAttnBlock(channels)


class Upsample(nn.Module):
    """Double the size by nearest neighbour, then convolve if with_conv."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class Downsample(nn.Module):
    """Halve the size by a strided convolution, or by average pooling."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, kernel_size=2, stride=2)
        # Released weights expect zeros on the right and below only; symmetric padding shifts by half a pixel.
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class ResnetBlock(nn.Module):
    """Compute x + conv(swish(norm(conv(swish(norm(x))) + temb))), with a convolution on the skip if channels change."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        temb_channels: int = 0,
        conv_shortcut: bool = False,
        norm_groups: int | None = NUM_GROUPS,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = group_norm(in_channels, GROUP_NORM_EPS, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = group_norm(out_channels, GROUP_NORM_EPS, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = self.nin_shortcut = None  # at most one of the two published names
        if in_channels != out_channels and conv_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        elif in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Return (B, out_channels, H, W); temb is (B, temb_channels), for blocks that were made with it."""
        h = self.conv1(activated(self.norm1, x))
        if temb is not None:
            h = h + rearrange(self.temb_proj(F.silu(temb)), "b c -> b c 1 1")
        h = self.conv2(self.dropout(activated(self.norm2, h)))
        shortcut = self.conv_shortcut if self.nin_shortcut is None else self.nin_shortcut
        return h + (x if shortcut is None else shortcut(x))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if there is any."""

    def __init__(
        self,
        widths: Sequence[tuple[int, int]],
        attention: Attention | None = None,
        dropout: float = 0.0,
        temb_channels: int = 0,
        norm_groups: int | None = NUM_GROUPS,
    ) -> None:
        """Build one block for each (in, out) of `widths`; attention None: without attention."""
        super().__init__()
        options = {"dropout": dropout, "temb_channels": temb_channels, "norm_groups": norm_groups}
        self.block = nn.ModuleList(ResnetBlock(a, b, **options) for a, b in widths)
        self.attn = nn.ModuleList(make_attention(b, attention, norm_groups) for _, b in widths if attention is not None)

    def step(self, j: int, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Return the output of block j and its attention."""
        x = self.block[j](x, temb)
        return self.attn[j](x) if len(self.attn) else x

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        for j in range(len(self.block)):
            x = self.step(j, x, temb)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(
        self,
        channels: int,
        attention: Attention,
        dropout: float = 0.0,
        temb_channels: int = 0,
        norm_groups: int | None = NUM_GROUPS,
    ) -> None:
        super().__init__()
        options = {"dropout": dropout, "temb_channels": temb_channels, "norm_groups": norm_groups}
        self.block_1 = ResnetBlock(channels, **options)
        self.attn_1 = make_attention(channels, attention, norm_groups)
        self.block_2 = ResnetBlock(channels, **options)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, temb)), temb)


def _blocks(network: nn.Module) -> list[nn.Module]:
    return [part for part in network.modules() if isinstance(part, (ResnetBlock, AttnBlock, LinAttnBlock))]


class Encoder(nn.Module):
    """Map an image to the features from which the regulariser makes a latent."""

    first_weight = "conv_in.weight"

    def __init__(self, arch: Architecture, double_z: bool = True) -> None:
        """double_z: 2 * z_channels output channels (mean and log variance) instead of z_channels."""
        super().__init__()
        widths = arch.level_channels
        self.conv_in = nn.Conv2d(arch.in_channels, arch.channels, 3, padding=1)
        self.down = nn.ModuleList()
        width_in = arch.channels
        for i, width in enumerate(widths):
            pairs = [(width_in, width)] + [(width, width)] * (arch.num_res_blocks - 1)
            attention = arch.attention if arch.has_attention(i) else None
            level = Level(pairs, attention, arch.dropout, norm_groups=arch.norm_groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, arch.resample_with_conv)
            self.down.append(level)
            width_in = width
        self.mid = Middle(widths[-1], arch.attention, arch.dropout, norm_groups=arch.norm_groups)
        self.norm_out = group_norm(widths[-1], GROUP_NORM_EPS, arch.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], arch.z_channels * (2 if double_z else 1), 3, padding=1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual blocks and attention; none contains another."""
        return _blocks(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H/f, W/f) for (B, in_channels, H, W), H and W multiples of f."""
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            h = level(h)
            if i < len(self.down) - 1:
                h = level.downsample(h)
        return self.conv_out(activated(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """Map a latent back to an image; the mirror of Encoder with one block more per level."""

    def __init__(self, arch: Architecture, give_pre_end: bool = False, tanh_out: bool = False) -> None:
        """give_pre_end: stop before the last norm; tanh_out: end in tanh."""
        super().__init__()
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        widths = arch.level_channels
        self.conv_in = nn.Conv2d(arch.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], arch.attention, arch.dropout, norm_groups=arch.norm_groups)
        levels = []
        width_in = widths[-1]
        for i in reversed(range(len(widths))):
            pairs = [(width_in, widths[i])] + [(widths[i], widths[i])] * arch.num_res_blocks
            attention = arch.attention if arch.has_attention(i) else None
            level = Level(pairs, attention, arch.dropout, norm_groups=arch.norm_groups)
            if i > 0:
                level.upsample = Upsample(widths[i], arch.resample_with_conv)
            levels.insert(0, level)  # up[i] is level i, 0 the highest resolution, although it runs last
            width_in = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(widths[0], GROUP_NORM_EPS, arch.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], arch.out_channels, 3, padding=1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual blocks and attention; none contains another."""
        return _blocks(self)

    def forward(self, z: Tensor) -> Tensor:
        """Return (B, out_channels, f*h, f*w) for (B, z_channels, h, w), or the last features if give_pre_end."""
        h = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            h = self.up[i](h)
            if i > 0:
                h = self.up[i].upsample(h)
        if self.give_pre_end:
            return h
        h = self.conv_out(activated(self.norm_out, h))
        return torch.tanh(h) if self.tanh_out else h
