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
from ldm.networks.backbone import Backbone, HiddenShape
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
        linear_projections: store the projections of spatial transformers as linear layers (Stable Diffusion 2, XL).
        checkpoint: recompute activations in the backward pass.
        dims: number of spatial axes, 1 to 3.
    """

    dropout: Fraction = 0.0
    conv_resample: bool = True
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    qkv_order: QKVOrder = "legacy"
    num_heads_upsample: Size | None = None
    linear_projections: bool = False
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
    transformer_depths: tuple[int, ...] = ()  # of the levels, with context_dim

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

    def attention(self, channels: int, level: int) -> AttentionBlock | SpatialTransformer:
        """Return self-attention, or with context_dim a spatial transformer of the depth of a level."""
        options = self.options
        if self.context_dim is None:
            return AttentionBlock(
                channels, self.num_heads, self.num_head_channels, options.qkv_order, options.checkpoint
            )
        heads, head_channels = head_split(channels, self.num_heads, self.num_head_channels)
        return SpatialTransformer(
            channels, heads, head_channels, self.transformer_depths[level], context_dim=self.context_dim,
            checkpoint=options.checkpoint, linear=options.linear_projections,
        )  # fmt: skip

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
            self.residual(channels, channels), self.attention(channels, -1), self.residual(channels, channels)
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


def time_mlp(model_channels: int, in_channels: int | None = None) -> nn.Sequential:
    """Return a perceptron to the width of the embedded time: (B, in_channels or C) -> (B, 4 C), C = model_channels."""
    width = 4 * model_channels
    return nn.Sequential(nn.Linear(in_channels or model_channels, width), nn.SiLU(), nn.Linear(width, width))


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
                layers.append(factory.attention(channels, level))
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
                layers.append(factory.attention(channels, level))
            if level and index == num_res_blocks:
                layers.append(factory.upsample(channels))
            blocks.append(TimestepSequential(*layers))
    return blocks


def hidden_shapes(model_channels: int, widths: Sequence[int], num_res_blocks: int) -> list[HiddenShape]:
    """Return the shapes of the states behind the blocks of encoder, middle and decoder."""
    down, up = [HiddenShape(model_channels, 1)], []
    for level, width in enumerate(widths):
        same = [HiddenShape(width, 2**level)] * num_res_blocks
        halved, doubled = HiddenShape(width, 2 ** (level + 1)), HiddenShape(width, 2 ** max(level - 1, 0))
        down += [*same, *([halved] if level + 1 < len(widths) else [])]
        up = [*same, doubled, *up]
    return [*down, down[-1], *up]


class UNet(nn.Module, Backbone):
    """Predict eps, x0 or v from a noisy latent, its time and a conditioning; or with `codebook_size` the codes' logits.

    `attention_factors` are downsampling factors (1 = full resolution). Exactly one of num_heads, num_head_channels.
    transformer_depth: of all spatial transformers, or one a level, the last also in the middle. num_classes: rows of a
    table of labels, or in its place vector_dim: width of vectors, that are added to the embedded time.
    """

    first_weight = "input_blocks.0.0.weight"

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
        transformer_depth: Depth | Sequence[Depth] = 1,
        num_classes: Size | None = None,
        vector_dim: Size | None = None,
        codebook_size: Size | None = None,
        options: UNetOptions = UNetOptions(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__()
        if (num_heads is None) == (num_head_channels is None):
            raise UserError("UNet: set exactly one of num_heads and num_head_channels")
        for factor in attention_factors:  # a power beyond the last level has no effect, as in published configs
            if factor < 1 or factor & (factor - 1):
                raise UserError(f"UNet: attention_factors: {factor} is that of no level; choose of 1, 2, 4, 8, ...")
        if num_classes is not None and vector_dim is not None:
            raise UserError("UNet: num_classes and vector_dim fill the same slot; set at most one of them")
        depths = [transformer_depth] * len(channel_mult) if isinstance(transformer_depth, int) else transformer_depth
        if len(depths) != len(channel_mult):
            raise UserError(f"UNet: transformer_depth has {len(depths)} depths for {len(channel_mult)} levels")
        self.model_channels = model_channels
        self.in_channels, self.out_channels = in_channels, codebook_size or out_channels
        self.context_dim, self.num_classes, self.vector_dim = context_dim, num_classes, vector_dim
        self.size_multiple = 2 ** (len(channel_mult) - 1)
        widths = [model_channels * mult for mult in channel_mult]
        encoder = BlockFactory(model_channels, num_heads, num_head_channels, options, context_dim, tuple(depths))
        decoder = encoder
        if options.num_heads_upsample is not None and num_heads is not None and context_dim is None:
            decoder = replace(encoder, num_heads=options.num_heads_upsample)
        self.hidden_shapes = hidden_shapes(model_channels, widths, num_res_blocks)
        self.time_embed = time_mlp(model_channels)
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, encoder.emb_channels)
        if vector_dim is not None:
            self.label_emb = nn.Sequential(time_mlp(model_channels, vector_dim))
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

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of encoder, middle and decoder in their order."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Return (B, out_channels, H, W) (or codebook_size channels) in the dtype of x.

        x (B, in_channels, H, W), t (B,) integer or fractional steps, context (B, L, D), y (B,) class ids or
        (B, vector_dim); hidden gets the state behind each block, (B, C, h, w).
        UserError for sizes that are no multiple of size_multiple, and for a condition that the network does not have.
        """
        self._check(x, context, y)
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(self.dtype))  # (B, 4 * model_channels)
        if self.label_emb is not None:
            emb = emb + self.label_emb(y if self.vector_dim is None else y.to(self.dtype))
        context = None if context is None else context.to(self.dtype)
        h, skips = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        if hidden is not None:
            hidden += [*skips, h]
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
            if hidden is not None:
                hidden.append(h)
        head = self.out if self.id_predictor is None else self.id_predictor
        return head(h).to(x.dtype)

    def _check(self, x: Tensor, context: Tensor | None, y: Tensor | None) -> None:
        sizes = x.shape[3:] if x.ndim == 5 else x.shape[2:]
        if any(size % self.size_multiple for size in sizes):
            raise UserError(f"UNet: size {tuple(sizes)} must be a multiple of {self.size_multiple} along every axis")
        if (y is None) != (self.label_emb is None):
            raise UserError("UNet: class ids y must be given if, and only if, num_classes (or vector_dim) is set")
        shape = (x.shape[0],) if self.vector_dim is None else (x.shape[0], self.vector_dim)
        if y is not None and y.shape != shape:
            raise UserError(f"UNet: y, class ids or vectors, has shape {tuple(y.shape)}; expected {shape}")
        if context is not None and context.shape[-1] != self.context_dim:
            raise UserError(f"UNet: context has {context.shape[-1]} channels, but context_dim is {self.context_dim}")
