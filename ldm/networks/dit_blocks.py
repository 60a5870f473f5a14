"""Blocks of diffusion transformers, with parameter names as published.

The plain block is that of DiT and SiT: attention and a perceptron, each scaled, shifted and gated by the condition
(adaLN-Zero; Peebles & Xie, arXiv 2212.09748, section 3.2). `BlockOptions` are the changes of LightningDiT (Yao et al.,
arXiv 2501.01423): rotary positions, normalised queries and keys, gated perceptron, RMS norm.
Legend: B batch, N tokens, D width, h heads, d channels of a head, M tokens of the context.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.networks.attention import CrossAttention, attend, split_qkv
from ldm.networks.fused_gate import gated
from ldm.networks.layers import LayerNorm32, RMSNorm32, recompute, zeroed

_CPU = torch.device("cpu")
_EPS = 1e-6  # of every norm, as published


@dataclass(frozen=True)
class BlockOptions:
    """What a block has beyond the plain one.

    Args:
        rotary: queries and keys are also rotated by their positions (Su et al., arXiv 2104.09864, on two axes).
        qk_norm: queries and keys are normalised, head by head (Henry et al., arXiv 2010.04245).
        gated: a SwiGLU perceptron of 2/3 of the inner width, which has the same size (Shazeer, arXiv 2002.05202).
        rms_norm: RMS norms with a learned scale, instead of layer norms without one.
        checkpoint: recompute activations in the backward pass.
    """

    rotary: bool = False
    qk_norm: bool = False
    gated: bool = False
    rms_norm: bool = False
    checkpoint: bool = False

    def norm(self, width: int) -> nn.Module:
        """Return the norm over the last axis."""
        if self.rms_norm:
            return RMSNorm32(width, eps=_EPS)
        return nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)

    def head_norm(self, width: int) -> nn.Module:
        """Return the norm of queries or of keys, which has a learned scale; without qk_norm the identity."""
        if not self.qk_norm:
            return nn.Identity()
        return RMSNorm32(width, eps=_EPS) if self.rms_norm else LayerNorm32(width, eps=_EPS)


class Attention(nn.Module):
    """Self-attention of tokens: (B, N, D) -> (B, N, D); rotation: cosines and sines (N, d) each, or None."""

    def __init__(self, dim: int, num_heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = options.head_norm(dim // num_heads)
        self.k_norm = options.head_norm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = split_qkv(self.qkv(x), self.num_heads, "new")  # (B, h, N, d) each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.proj(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of x (..., N, d) by their angles; cos, sin (N, d) hold each twice."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class Mlp(nn.Module):
    """Perceptron with one hidden layer and the approximate GELU: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """Perceptron whose hidden layer is SiLU(gate) * value: (..., D) -> (..., D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(gated(self.w12(x), "silu", gate_first=True))


def modulation(dim: int, number: int) -> nn.Sequential:
    """Return what makes `number` vectors (B, D) from the condition (B, D), side by side; all 0 at first."""
    return nn.Sequential(nn.SiLU(), zeroed(nn.Linear(dim, number * dim)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, N, D) scaled by 1 + scale and shifted; both (B, 1, D)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to a context if there is one, perceptron; begins as the identity.

    x (B, N, D), c (B, D), context (B, M, context_dim), rotation as in `Attention` -> (B, N, D).
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, context_dim: int | None, options: BlockOptions
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.checkpoint = options.checkpoint
        self.norm1 = options.norm(dim)
        self.attn = Attention(dim, num_heads, options)
        self.cross_attn = None
        if context_dim is not None:
            self.norm_cross = options.norm(dim)
            self.cross_attn = CrossAttention(dim, context_dim, num_heads, dim // num_heads)
            zeroed(self.cross_attn.to_out)
        self.norm2 = options.norm(dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * hidden)) if options.gated else Mlp(dim, hidden)
        self.adaLN_modulation = modulation(dim, 6)

    def forward(
        self, x: Tensor, c: Tensor, context: Tensor | None = None, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        return recompute(self.checkpoint, self._forward, x, c, context, rotation)

    def _forward(self, x: Tensor, c: Tensor, context: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rotation)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm_cross(x), context)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """From tokens (B, N, D) and condition (B, D) to the pixels of patches, (B, N, out_features); 0 at first."""

    def __init__(self, dim: int, out_features: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm_final = options.norm(dim)
        self.linear = zeroed(nn.Linear(dim, out_features))
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def sincos_positions(dim: int, height: int, width: int, trained: int, device: torch.device = _CPU) -> Tensor:
    """Return fixed embeddings of the places of a grid, row by row: (height * width, dim) float32, dim divisible by 4.

    The first half tells the column, the second the row; each of sines, then cosines of dim // 4 frequencies from 1
    down to nearly 1 / 10000 (the published order). A grid of another size than trained x trained is spread over the
    trained range, as in diffusers. On CUDA they are computed on the device, so that nothing waits for a copy.
    """
    exact = {"dtype": torch.float64, "device": _with_float64(device)}
    columns, rows = _places(width, trained, exact), _places(height, trained, exact)
    frequencies = 10000.0 ** -(torch.arange(dim // 4, **exact) / (dim // 4))
    by_axis = []
    for places in (columns, rows):
        angles = places[:, None] * frequencies  # (n, dim / 4)
        by_axis.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    across = repeat(by_axis[0], "w d -> (h w) d", h=height)
    down = repeat(by_axis[1], "h d -> (h w) d", w=width)
    return torch.cat([across, down], dim=-1).float().to(device)


def rotary_angles(head_channels: int, height: int, width: int, trained: int, device: torch.device = _CPU) -> Tensor:
    """Return the angles by which places of a grid are rotated, row by row: (height * width, head_channels) float32.

    The first half of the channels, divisible by 2, is rotated by the row, the second by the column. Grids of other
    sizes, and the device, as in `sincos_positions`.
    """
    half, exact = head_channels // 2, {"dtype": torch.float64, "device": _with_float64(device)}
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, **exact) / half)
    rows = repeat(_places(height, trained, exact)[:, None] * frequencies, "h d -> (h w) (d two)", w=width, two=2)
    columns = repeat(_places(width, trained, exact)[:, None] * frequencies, "w d -> (h w) (d two)", h=height, two=2)
    return torch.cat([rows, columns], dim=-1).float().to(device)


def _places(number: int, trained: int, exact: dict[str, Any]) -> Tensor:
    """Return `number` places from 0, in steps that spread them over `trained` places."""
    return torch.arange(number, **exact) * (trained / number)


def _with_float64(device: torch.device) -> torch.device:
    """Return the device if it is one of CUDA; Apple's have no float64, and nothing waits for a CPU."""
    return device if device.type == "cuda" else _CPU
