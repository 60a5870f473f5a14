"""Sinusoidal embedding of the diffusion time (Vaswani et al. 2017), in the order and spacing of the released U-Nets."""

import math

import torch
from einops import repeat
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Embed times as [cos, sin] of dim // 2 frequencies from 1 down to nearly 1 / max_period.

    t (B,) integer or fractional -> (B, dim) float32; an odd dim ends in a zero. repeat_only: return copies of t.
    """
    if repeat_only:
        return repeat(t, "b -> b d", d=dim)
    half = dim // 2
    # Divided by half, not by half - 1: released weights depend on it.
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t[:, None].float() * frequencies  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
