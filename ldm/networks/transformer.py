"""The paper's trainable text encoder tau_theta (appendix E.2.1): a pre-norm transformer over token ids.

Names and initial values are those of the x-transformers release that the published weights were trained with: learned
absolute positions, 8 heads of 64 channels for every width, exact GELU, and an output projection to the vocabulary that
is part of the checkpoints but not used.
Legend: B batch, L tokens, D = dim.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.bounds import Depth, Fraction, NonNegative, Size
from ldm.errors import UserError
from ldm.networks.attention import FeedForward, attend
from ldm.networks.layers import LayerNorm32


class SelfAttention(nn.Module):
    """Multi-headed attention of every token to all tokens: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, num_heads: int = 8, head_channels: int = 64) -> None:
        super().__init__()
        inner_dim = num_heads * head_channels
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(dim, inner_dim, bias=False)
        self.to_v = nn.Linear(dim, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        split = {"pattern": "b n (h d) -> b h n d", "h": self.num_heads}
        q, k, v = (rearrange(layer(x), **split) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))


class PositionalEmbedding(nn.Module):
    """Learned embedding of absolute positions: (L,) integers below max_length -> (L, D)."""

    def __init__(self, max_length: int, dim: int, std: float) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_length, dim)
        nn.init.normal_(self.emb.weight, std=std)

    def forward(self, positions: Tensor) -> Tensor:
        return self.emb(positions)


class TransformerLayers(nn.Module):
    """`depth` pairs of attention and feed-forward, each pre-norm and residual: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, depth: int, num_heads: int = 8, head_channels: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(nn.ModuleList([LayerNorm32(dim), SelfAttention(dim, num_heads, head_channels)]))
            self.layers.append(nn.ModuleList([LayerNorm32(dim), FeedForward(dim)]))

    @property
    def blocks(self) -> list[nn.Module]:
        """Attention and feed-forward layers in their order."""
        return [layer for _, layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class TransformerEncoder(nn.Module):
    """Encode token ids: (B, L) integers below vocab_size, L <= max_length (else UserError) -> (B, L, dim).

    embedding_std: standard deviation of the initial token and position embeddings. 0.02 is the published value; with 1
    a small model learns the order of words far sooner, since Adam's first steps do not overwrite the embeddings.
    """

    def __init__(
        self,
        vocab_size: Size,
        max_length: Size,
        dim: Size,
        depth: Depth,
        num_heads: Size = 8,
        head_channels: Size = 64,
        embedding_dropout: Fraction = 0.0,
        embedding_std: NonNegative = 0.02,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.token_emb = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.token_emb.weight, std=embedding_std)
        self.pos_emb = PositionalEmbedding(max_length, dim, embedding_std)
        self.emb_dropout = nn.Dropout(embedding_dropout)
        self.attn_layers = TransformerLayers(dim, depth, num_heads, head_channels)
        self.norm = LayerNorm32(dim)
        self.to_logits = nn.Linear(dim, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length > self.max_length:
            raise UserError(f"{length} tokens are too many for max_length={self.max_length}: truncate them or raise it")
        positions = torch.arange(length, device=ids.device)
        x = self.emb_dropout(self.token_emb(ids) + self.pos_emb(positions))  # (B, L, D)
        return self.norm(self.attn_layers(x))
