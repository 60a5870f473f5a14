"""Classifier of noisy latents for guidance (Dhariwal, Nichol 2021): the U-Net's encoder with a pooling head.

Legend: B batch, C channels, f = downsampling factor of a level.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.attention import AttentionPool2d
from ldm.networks.embeddings import timestep_embedding
from ldm.networks.layers import GroupNorm32, conv, zeroed
from ldm.networks.unet import BlockFactory, UNetOptions, down_path, time_mlp

Pool: TypeAlias = Literal["adaptive", "attention", "spatial", "spatial_v2"]
_POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
_ADAPTIVE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_HIDDEN = 2048


class EncoderUNet(nn.Module):
    """Map a noisy latent and its time to logits.

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
