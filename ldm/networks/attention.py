"""Attention softmax(Q K^T / sqrt(d)) V over image positions and conditioning tokens (section 3.3 of arXiv 2112.10752).

Images become sequences of tokens, (B, C, H, W) -> (B, H*W, C), which costs nothing for channels_last tensors. `attend`
says how softmax attention is computed.
Legend: B batch, C channels, N and M numbers of tokens, h heads, d channels of a head.
"""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.fused_gate import gated
from ldm.networks.fused_norm import computes_on_cuda
from ldm.networks.layers import NUM_GROUPS, GroupNorm32, LayerNorm32, group_norm, recompute, zeroed
from ldm.networks.pointwise import PointwiseConv1d, PointwiseConv2d, from_tokens, to_tokens

QKVOrder: TypeAlias = Literal["legacy", "new"]
# The order of queries, keys and values in the 3C channels of one projection ("legacy" splits the heads first), and the
# axis that separates them. Separating them before the heads are moved saves a copy in the backward pass.
_QKV_LAYOUTS = {"legacy": ("b n (h qkv d) -> b n h qkv d", 3), "new": ("b n (qkv h d) -> b n qkv h d", 2)}


_WIDEST_FUSED = 256  # channels of a head that the fused kernels of CUDA take
_LARGEST_PRODUCT = 2**30  # entries of (B, h, N, M) that are kept, in half precision and once more in float32


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias) v for q (B, h, N, d), k and v (B, h, M, d), bias (B, 1, 1, M)."""
    if _is_faster_by_products(q, k, bias):
        return by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v by two matrix products, with the softmax in float32."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, h, N, M)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _is_faster_by_products(q: Tensor, k: Tensor, bias: Tensor | None) -> bool:
    """Return whether two matrix products beat torch's kernels, which keep no (N, M) matrix.

    On CUDA neither flash attention nor cuDNN takes a wide head, and the kernel that is left goes back 10 to 17 times as
    slowly as forwards (H200, torch 2.11). Its forward pass alone is fast; in float32 the products would not be.
    """
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    fits = q.shape[:-1].numel() * k.shape[-2] <= _LARGEST_PRODUCT
    return computes_on_cuda(q) and is_half and bias is None and q.shape[-1] > _WIDEST_FUSED and needs_gradient and fits


def split_qkv(qkv: Tensor, num_heads: int, order: QKVOrder) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of projected tokens: (B, N, 3*h*d) -> three views (B, h, N, d)."""
    pattern, axis = _QKV_LAYOUTS[order]
    q, k, v = rearrange(qkv, pattern, qkv=3, h=num_heads).unbind(axis)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def head_split(channels: int, num_heads: int | None, num_head_channels: int | None) -> tuple[int, int]:
    """Return (number of heads, channels of a head) for `channels`; `num_head_channels` takes precedence.

    UserError where they do not divide the channels.
    """
    heads = num_heads if num_head_channels is None else channels // num_head_channels
    if not heads or channels % heads or (num_head_channels and channels != heads * num_head_channels):
        raise UserError(
            f"{channels} channels cannot form heads with num_heads={num_heads}, num_head_channels={num_head_channels}:"
            " set one of them, to a divisor of the channels of every level with attention"
        )
    return heads, channels // heads


class CrossAttention(nn.Module):
    """Attend from x to the context, or to x itself without one.

    x (B, N, query_dim), context (B, M, context_dim), mask (B, ...) of M booleans, True = attend -> (B, N, query_dim).
    A row without any True attends to all tokens equally.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        num_heads: int = 8,
        head_channels: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner_dim = num_heads * head_channels
        context_dim = query_dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        if context.shape[1] == 1 and x.shape[1] > 1:
            return self._of_one_token(x, context)
        split = {"pattern": "b n (h d) -> b h n d", "h": self.num_heads}
        q, k, v = (rearrange(y, **split) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        bias = None
        if mask is not None:
            # The lowest finite number instead of -inf: a fully masked row gives the mean, not NaN.
            mask = rearrange(mask, "b ... -> b 1 1 (...)")
            bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
        return self.to_out(rearrange(attend(q, k, v, bias), "b h n d -> b n (h d)"))

    def _of_one_token(self, x: Tensor, context: Tensor) -> Tensor:
        """Return what every query gets from one token: its value, as the softmax of one number is 1.

        One query stands for all, so that queries and keys have gradients, of exactly 0.
        """
        projected = self.to_q(x[:, :1]), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in projected)  # (B, 1, h, d)
        weight = (q.float() * k.float()).sum(-1, keepdim=True).softmax(-1)  # (B, 1, h, 1), all 1
        out = (weight.to(v.dtype) * v).flatten(2)
        projection, dropout = self.to_out
        return dropout(projection(out).expand(-1, x.shape[1], -1))


class GEGLU(nn.Module):
    """Gated linear unit value * GELU(gate), with the exact GELU: (..., dim_in) -> (..., dim_out)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return gated(self.proj(x), "gelu")


class FeedForward(nn.Module):
    """Two-layer perceptron of a transformer, `mult` times as wide inside: (..., dim) -> (..., dim_out or dim)."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = int(dim * mult)
        project = GEGLU(dim, inner_dim) if glu else nn.Sequential(nn.Linear(dim, inner_dim), nn.GELU())
        dim_out = dim if dim_out is None else dim_out
        self.net = nn.Sequential(project, nn.Dropout(dropout), nn.Linear(inner_dim, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention (without a context: to itself again), feed-forward; each pre-norm and residual.

    x (B, N, dim), context (B, M, context_dim) or None -> (B, N, dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_channels: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, num_heads, head_channels, dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, num_heads, head_channels, dropout)
        self.norm1 = LayerNorm32(dim)
        self.norm2 = LayerNorm32(dim)
        self.norm3 = LayerNorm32(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return recompute(self.checkpoint, self._forward, x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (appendix E.2.1), residual; begins as the identity.

    x (B, in_channels, H, W), context (B, M, context_dim) or None -> (B, in_channels, H, W), in the memory format of x.
    linear: whether the projections around the blocks are stored as linear layers, the same mathematics.
    """

    def __init__(
        self,
        in_channels: int,
        num_heads: int,
        head_channels: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        checkpoint: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = num_heads * head_channels
        self.linear, projection = linear, nn.Linear if linear else PointwiseConv2d
        self.norm = GroupNorm32(in_channels, eps=1e-6)
        self.proj_in = projection(in_channels, inner_dim)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, num_heads, head_channels, dropout, context_dim, checkpoint=checkpoint)
            for _ in range(depth)
        )
        self.proj_out = zeroed(projection(inner_dim, in_channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        tokens = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))  # (B, H*W, h*d)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.linear:
            return x + from_tokens(self.proj_out(tokens), x)
        return x + self.proj_out(from_tokens(tokens, x))  # (B, C, H, W)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, residual; begins as the identity.

    (B, C, ...) -> (B, C, ...). `qkv_order` is the order of the 3C projected channels, which must be that of the
    checkpoint. `num_head_channels` takes precedence over `num_heads`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int | None = 1,
        num_head_channels: int | None = None,
        qkv_order: QKVOrder = "legacy",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if qkv_order not in _QKV_LAYOUTS:
            raise UserError(f"qkv_order: {qkv_order!r} is unknown; choose one of {', '.join(_QKV_LAYOUTS)}")
        self.num_heads, _ = head_split(channels, num_heads, num_head_channels)
        self.qkv_order = qkv_order
        self.checkpoint = checkpoint
        self.norm = GroupNorm32(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.proj_out = zeroed(PointwiseConv1d(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return recompute(self.checkpoint, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2)  # (B, C, N)
        q, k, v = split_qkv(to_tokens(self.qkv(h)), self.num_heads, self.qkv_order)  # (B, h, N, d) each
        out = rearrange(attend(q, k, v), "b h n d -> b n (h d)")
        return x + self.proj_out(from_tokens(out, h)).unflatten(2, x.shape[2:])


class LinearAttention(nn.Module):
    """Attention of linear cost, Q (softmax(K)^T V), softmax over positions: (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, heads: int = 4, head_channels: int = 32) -> None:
        super().__init__()
        self.num_heads = heads
        inner_dim = heads * head_channels
        self.to_qkv = PointwiseConv2d(dim, 3 * inner_dim, bias=False)
        self.to_out = PointwiseConv2d(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_qkv(to_tokens(self.to_qkv(x)), self.num_heads, "new")
        summary = k.softmax(dim=-2).transpose(-1, -2) @ v  # (B, h, d, d)
        return self.to_out(from_tokens(rearrange(q @ summary, "b h n d -> b n (h d)"), x))


class SpatialSelfAttention(nn.Module):
    """Single-headed self-attention as wide as the feature map, residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, in_channels: int, norm_groups: int | None = NUM_GROUPS) -> None:
        super().__init__()
        self.norm = group_norm(in_channels, 1e-6, norm_groups)
        self.q = PointwiseConv2d(in_channels, in_channels)
        self.k = PointwiseConv2d(in_channels, in_channels)
        self.v = PointwiseConv2d(in_channels, in_channels)
        self.proj_out = PointwiseConv2d(in_channels, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).contiguous(memory_format=torch.channels_last)  # one copy at most, not one a projection
        q, k, v = (rearrange(to_tokens(layer(h)), "b n c -> b 1 n c") for layer in (self.q, self.k, self.v))
        out = rearrange(attend(q, k, v), "b 1 n c -> b n c")
        return x + self.proj_out(from_tokens(out, x))


class AttentionPool2d(nn.Module):
    """Pool a feature map by the attention of its mean to every position: (B, embed_dim, H, W) -> (B, output_dim).

    Positions have learned embeddings, so H = W = `spatial_size` is required (UserError).
    """

    def __init__(
        self, spatial_size: int, embed_dim: int, num_head_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.num_heads, _ = head_split(embed_dim, None, num_head_channels)
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spatial_size**2 + 1) / embed_dim**0.5)
        self.qkv_proj = PointwiseConv1d(embed_dim, 3 * embed_dim)
        self.c_proj = PointwiseConv1d(embed_dim, embed_dim if output_dim is None else output_dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        if tokens.shape[1] + 1 != self.positional_embedding.shape[1]:
            size = tuple(x.shape[2:])
            raise UserError(f"attention pooling got a map of {size}; set image_size to the size of the input")
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)  # (B, 1+N, C)
        tokens = tokens + rearrange(self.positional_embedding, "c n -> n c").to(tokens.dtype)
        qkv = to_tokens(self.qkv_proj(rearrange(tokens, "b n c -> b c n")))
        q, k, v = split_qkv(qkv, self.num_heads, "new")
        pooled = attend(q[:, :, :1], k, v)  # (B, h, 1, d): only the mean's row is used
        return self.c_proj(rearrange(pooled, "b h 1 d -> b (h d) 1"))[..., 0]
