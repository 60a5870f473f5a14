"""The time-conditional U-Net eps_theta(z_t, t, tau(y)) of latent diffusion (section 3.2, 3.3; appendix E.2).

Residual blocks at every level, attention at the levels whose downsampling factor is listed: self-attention only, or
with `context_dim` spatial transformers that also attend to a conditioning sequence. Positions in `input_blocks`,
`middle_block`, `output_blocks`, `out` are part of the checkpoint format.
Legend: B batch, C channels, L conditioning tokens, D = context_dim, f = downsampling factor of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldm.bounds import Depth, Fraction, Levels, Size
from ldm.errors import UserError
from ldm.networks.attention import AttentionBlock, QKVOrder, SpatialTransformer, head_split
from ldm.networks.backbone import Backbone
from ldm.networks.embeddings import timestep_embedding
from ldm.networks.layers import GroupNorm32, conv, zeroed
from ldm.networks.residual import Downsample, ResBlock, Upsample


@dataclass(frozen=True)
class UNetOptions:
    """Options of a U-Net that seldom change.

    Args:
        conv_resample: convolutions at changes of resolution, else averaging and repetition only.
        resblock_updown: residual blocks change the resolution instead.
        num_heads_upsample: number of heads of the decoder's self-attention, if it differs.
        checkpoint: recompute activations in the backward pass.
        dims: number of spatial axes, 1 to 3.
    """

    dropout: Fraction = 0.0
    conv_resample: bool = True
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    qkv_order: QKVOrder = "legacy"
    num_heads_upsample: Size | None = None
    checkpoint: bool = False
    dims: Size = 2

    def __post_init__(self) -> None:
        if self.dims not in (1, 2, 3):
            raise UserError(f"UNetOptions: dims={self.dims} is unknown; choose 1, 2 or 3")


@dataclass(frozen=True)
class BlockFactory:
    """Builds the blocks of one network, all with the same options."""

    model_channels: int
    num_heads: int | None
    num_head_channels: int | None
    options: UNetOptions
    context_dim: int | None = None
    transformer_depth: int = 1

    @property
    def emb_channels(self) -> int:
        """Return the width of the embedded time."""
        return 4 * self.model_channels

    def residual(self, channels: int, out_channels: int, *, up: bool = False, down: bool = False) -> ResBlock:
        """Return a residual block; up, down: it also doubles or halves the resolution."""
        return ResBlock(
            channels,
            self.emb_channels,
            self.options.dropout,
            out_channels,
            use_scale_shift_norm=self.options.scale_shift_norm,
            dims=self.options.dims,
            checkpoint=self.options.checkpoint,
            up=up,
            down=down,
        )

    def attention(self, channels: int) -> AttentionBlock | SpatialTransformer:
        """Return self-attention, or with context_dim a spatial transformer."""
        checkpoint = self.options.checkpoint
        if self.context_dim is None:
            order = self.options.qkv_order
            return AttentionBlock(channels, self.num_heads, self.num_head_channels, order, checkpoint)
        heads, head_channels = head_split(channels, self.num_heads, self.num_head_channels)
        return SpatialTransformer(
            channels, heads, head_channels, self.transformer_depth, context_dim=self.context_dim, checkpoint=checkpoint
        )

    def downsample(self, channels: int) -> nn.Module:
        """Return what halves the resolution."""
        if self.options.resblock_updown:
            return self.residual(channels, channels, down=True)
        return Downsample(channels, self.options.conv_resample, self.options.dims)

    def upsample(self, channels: int) -> nn.Module:
        """Return what doubles the resolution."""
        if self.options.resblock_updown:
            return self.residual(channels, channels, up=True)
        return Upsample(channels, self.options.conv_resample, self.options.dims)

    def middle(self, channels: int) -> "TimestepSequential":
        """Return block, attention, block for the lowest resolution."""
        return TimestepSequential(
            self.residual(channels, channels), self.attention(channels), self.residual(channels, channels)
        )


class TimestepSequential(nn.Sequential):
    """A sequence that passes the time embedding to residual blocks and the context to spatial transformers."""

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


def time_mlp(model_channels: int) -> nn.Sequential:
    """Return the perceptron after the sinusoidal embedding: (B, model_channels) -> (B, 4 * model_channels)."""
    width = 4 * model_channels
    return nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))


def down_path(
    factory: BlockFactory,
    in_channels: int,
    widths: Sequence[int],
    num_res_blocks: int,
    attention_factors: Sequence[int],
) -> tuple[nn.ModuleList, list[int]]:
    """Return the blocks of an encoder with one level for each of `widths`, and the channels of their outputs."""
    channels = factory.model_channels
    blocks = nn.ModuleList([TimestepSequential(conv(factory.options.dims, in_channels, channels, 3, padding=1))])
    outputs = [channels]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers: list[nn.Module] = [factory.residual(channels, width)]
            channels = width
            if 2**level in attention_factors:
                layers.append(factory.attention(channels))
            blocks.append(TimestepSequential(*layers))
            outputs.append(channels)
        if level + 1 < len(widths):
            blocks.append(TimestepSequential(factory.downsample(channels)))
            outputs.append(channels)
    return blocks, outputs


def up_path(
    factory: BlockFactory,
    skips: Sequence[int],
    widths: Sequence[int],
    num_res_blocks: int,
    attention_factors: Sequence[int],
) -> nn.ModuleList:
    """Return the blocks of a decoder, each of which takes one of the encoder's outputs (channels in `skips`)."""
    skips, channels = list(skips), skips[-1]
    blocks = nn.ModuleList()
    for level in reversed(range(len(widths))):
        for index in range(num_res_blocks + 1):
            layers: list[nn.Module] = [factory.residual(channels + skips.pop(), widths[level])]
            channels = widths[level]
            if 2**level in attention_factors:
                layers.append(factory.attention(channels))
            if level and index == num_res_blocks:
                layers.append(factory.upsample(channels))
            blocks.append(TimestepSequential(*layers))
    return blocks


class UNet(nn.Module, Backbone):
    """Predict eps, x0 or v from a noisy latent, its time and a conditioning; or with `codebook_size` the codes' logits.

    `attention_factors` are downsampling factors (1 = full resolution). Exactly one of num_heads, num_head_channels.
    """

    def __init__(
        self,
        in_channels: Size,
        out_channels: Size,
        model_channels: Size,
        num_res_blocks: Depth = 2,
        attention_factors: Sequence[Size] = (8, 4, 2),
        channel_mult: Levels = (1, 2, 4, 8),
        num_heads: Size | None = None,
        num_head_channels: Size | None = None,
        context_dim: Size | None = None,
        transformer_depth: Depth = 1,
        num_classes: Size | None = None,
        codebook_size: Size | None = None,
        options: UNetOptions = UNetOptions(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__()
        if (num_heads is None) == (num_head_channels is None):
            raise UserError("UNet: set exactly one of num_heads and num_head_channels")
        for factor in attention_factors:  # a power beyond the last level has no effect, as in published configs
            if factor < 1 or factor & (factor - 1):
                raise UserError(f"UNet: attention_factors: {factor} is that of no level; choose of 1, 2, 4, 8, ...")
        self.model_channels = model_channels
        self.in_channels, self.out_channels = in_channels, codebook_size or out_channels
        self.context_dim, self.num_classes = context_dim, num_classes
        self.size_multiple = 2 ** (len(channel_mult) - 1)
        widths = [model_channels * mult for mult in channel_mult]
        encoder = BlockFactory(model_channels, num_heads, num_head_channels, options, context_dim, transformer_depth)
        decoder = encoder
        if options.num_heads_upsample is not None and num_heads is not None and context_dim is None:
            decoder = replace(encoder, num_heads=options.num_heads_upsample)
        self.time_embed = time_mlp(model_channels)
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, encoder.emb_channels)
        self.input_blocks, skips = down_path(encoder, in_channels, widths, num_res_blocks, attention_factors)
        self.middle_block = encoder.middle(skips[-1])
        self.output_blocks = up_path(decoder, skips, widths, num_res_blocks, attention_factors)
        last = zeroed(conv(options.dims, widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(GroupNorm32(widths[0]), nn.SiLU(), last)
        self.id_predictor = None
        if codebook_size is not None:
            last = conv(options.dims, widths[0], codebook_size, 1)
            self.id_predictor = nn.Sequential(GroupNorm32(widths[0]), last)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes unless autocast says otherwise."""
        return self.time_embed[0].weight.dtype

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of encoder, middle and decoder in their order."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Return (B, out_channels, H, W) (or codebook_size channels) in the dtype of x.

        x (B, in_channels, H, W), t (B,) integer or fractional steps, context (B, L, D), y (B,) class ids.
        UserError for sizes that are no multiple of size_multiple, and for a condition that the network does not have.
        """
        self._check(x, context, y)
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(self.dtype))  # (B, 4 * model_channels)
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)
        context = None if context is None else context.to(self.dtype)
        h, skips = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        head = self.out if self.id_predictor is None else self.id_predictor
        return head(h).to(x.dtype)

    def _check(self, x: Tensor, context: Tensor | None, y: Tensor | None) -> None:
        sizes = x.shape[3:] if x.ndim == 5 else x.shape[2:]
        if any(size % self.size_multiple for size in sizes):
            raise UserError(f"UNet: size {tuple(sizes)} must be a multiple of {self.size_multiple} along every axis")
        if (y is None) != (self.label_emb is None):
            raise UserError("UNet: class ids y must be given if, and only if, num_classes is set")
        if y is not None and y.shape != x.shape[:1]:
            raise UserError(f"UNet: class ids have shape {tuple(y.shape)}; expected ({x.shape[0]},)")
        if context is not None and context.shape[-1] != self.context_dim:
            raise UserError(f"UNet: context has {context.shape[-1]} channels, but context_dim is {self.context_dim}")
