"""A diffusion transformer as the network of a latent diffusion model (DiT: Peebles & Xie, arXiv 2212.09748).

The latent is cut into patches, which are the tokens of a transformer that is told time and class by adaptive norms,
and a text by cross-attention (as PixArt-alpha: Chen et al., arXiv 2310.00426). Parameter names are those of the
released DiT, SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423) checkpoints.
Legend: B batch, C channels, N tokens, D = hidden_size, p = patch_size.
"""

from typing import Annotated

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.bounds import Depth, Gt, Natural, Size
from ldm.errors import UserError
from ldm.networks.backbone import Backbone, HiddenShape
from ldm.networks.dit_blocks import BlockOptions, DiTBlock, FinalLayer, rotary_angles, sincos_positions
from ldm.networks.embeddings import timestep_embedding

_FREQUENCIES = 256  # channels of the sinusoidal embedding of time, as published


class DiT(nn.Module, Backbone):
    """Predict from a noisy latent, its time and a condition by a transformer over patches.

    Args:
        in_channels: of the latent and of what conditioners concatenate to it.
        out_channels: of the prediction; twice those of the latent where the variance is learned, too.
        input_size: side of the latents of the training, a multiple of patch_size. Other sizes, also oblong ones, work:
            their positions are spread over the trained range.
        dropped_outputs: further channels of the last layer, which are dropped: released SiT checkpoints have as many
            as the latent.
        num_classes: rows of the table of labels, the null label included.
        context_dim: channels of the tokens of cross-attention.

    UserError for sizes that do not divide.
    """

    def __init__(
        self,
        in_channels: Size,
        out_channels: Size,
        input_size: Size,
        patch_size: Size = 2,
        hidden_size: Size = 1152,
        depth: Depth = 28,
        num_heads: Size = 16,
        mlp_ratio: Annotated[float, Gt(0)] = 4.0,
        num_classes: Size | None = None,
        context_dim: Size | None = None,
        dropped_outputs: Natural = 0,
        options: BlockOptions = BlockOptions(),  # noqa: B008 (immutable)
    ) -> None:
        super().__init__()
        _check_divisible("hidden_size", hidden_size, 4, "sines and cosines of two axes")
        _check_divisible("hidden_size", hidden_size, num_heads, "num_heads")
        _check_divisible("input_size", input_size, patch_size, "patch_size")
        if options.rotary:
            _check_divisible("hidden_size / num_heads", hidden_size // num_heads, 4, "pairs of two axes")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_dim, self.num_classes = context_dim, num_classes
        self.size_multiple = patch_size
        self.trained_places = input_size // patch_size  # along each side
        self.head_channels = hidden_size // num_heads

        self.x_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.t_embedder = TimeEmbedding(hidden_size)
        self.y_embedder = None if num_classes is None else LabelEmbedding(num_classes, hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, context_dim, options) for _ in range(depth)
        )
        self.hidden_shapes = [HiddenShape(hidden_size, patch_size)] * depth
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * (out_channels + dropped_outputs), options)
        # Neither is learned, but both are part of the checkpoint format.
        side = self.trained_places
        positions = sincos_positions(hidden_size, side, side, side)[None]
        self.register_buffer("pos_embed", positions.to(torch.get_default_device()))
        self.feat_rope = RotaryTable(self.head_channels, side) if options.rotary else None
        self._initialise()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes unless autocast says otherwise."""
        return self.t_embedder.mlp[0].weight.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Return (B, out_channels, H, W) in the dtype of x.

        x (B, in_channels, H, W), t (B,) integer or fractional times, context (B, L, context_dim), y (B,) class ids;
        hidden gets the state behind each block, (B, D, H / p, W / p).
        UserError for sizes that are no multiple of patch_size, and for a condition that the network does not have.
        """
        self._check(x, context, y)
        height, width = x.shape[2] // self.size_multiple, x.shape[3] // self.size_multiple
        c = self.t_embedder(t, self.dtype)  # (B, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y)
        tokens = self.x_embedder(x.to(self.dtype))  # (B, N, D)
        tokens = tokens + self._positions(height, width).to(tokens.dtype)
        context = None if context is None else context.to(self.dtype)
        rotation = None if self.feat_rope is None else self.feat_rope(height, width)
        for block in self.blocks:
            tokens = block(tokens, c, context, rotation)
            if hidden is not None:
                hidden.append(rearrange(tokens, "b (h w) d -> b d h w", h=height))
        patches = self.final_layer(tokens, c)  # (B, N, p * p * channels)
        p = self.size_multiple
        pixels = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)
        return pixels[:, : self.out_channels].to(x.dtype)

    def _positions(self, height: int, width: int) -> Tensor:
        if height == width == self.trained_places:
            return self.pos_embed
        return sincos_positions(self.pos_embed.shape[-1], height, width, self.trained_places, self.pos_embed.device)

    def _initialise(self) -> None:
        """Set initial weights: Glorot's where a layer is not zero, small embeddings (section 3.2 of the paper)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "adaLN_modulation" not in name and name != "final_layer.linear":
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a view: writes into the convolution
        nn.init.zeros_(self.x_embedder.proj.bias)
        for block in self.blocks:
            if block.cross_attn is not None:
                nn.init.zeros_(block.cross_attn.to_out[0].weight)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def _check(self, x: Tensor, context: Tensor | None, y: Tensor | None) -> None:
        if any(side % self.size_multiple for side in x.shape[2:]):
            raise UserError(f"DiT: size {tuple(x.shape[2:])} must be a multiple of {self.size_multiple} (patch_size)")
        if (y is None) != (self.num_classes is None):
            raise UserError("DiT: class ids y must be given if, and only if, num_classes is set")
        if y is not None and y.shape != x.shape[:1]:
            raise UserError(f"DiT: class ids have shape {tuple(y.shape)}; expected ({x.shape[0]},)")
        if (context is None) != (self.context_dim is None):
            raise UserError("DiT: a context must be given if, and only if, context_dim is set")
        if context is not None and context.shape[-1] != self.context_dim:
            raise UserError(f"DiT: context has {context.shape[-1]} channels, but context_dim is {self.context_dim}")


class PatchEmbedding(nn.Module):
    """Project patches that do not overlap: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class TimeEmbedding(nn.Module):
    """Embed times: (B,) -> (B, D) in `dtype`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(t, _FREQUENCIES).to(dtype))


class LabelEmbedding(nn.Module):
    """Embed class ids: (B,) -> (B, D)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes, dim)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class RotaryTable(nn.Module):
    """Cosines and sines of the rotations of a grid: (height, width) -> two tensors (height * width, head_channels)."""

    def __init__(self, head_channels: int, trained: int) -> None:
        super().__init__()
        self.head_channels, self.trained = head_channels, trained
        angles = rotary_angles(head_channels, trained, trained, trained).to(torch.get_default_device())
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        if height == width == self.trained:
            return self.freqs_cos, self.freqs_sin
        angles = rotary_angles(self.head_channels, height, width, self.trained, self.freqs_cos.device)
        return angles.cos(), angles.sin()


def _check_divisible(name: str, size: int, divisor: int, reason: str) -> None:
    if size % divisor:
        raise UserError(f"DiT: {name} is {size}; it must be a multiple of {divisor} ({reason})")
