"""Enlarged pictures held to the small ones that they were made from, by back projection.

Irani and Peleg, Improving resolution by image registration (1991): what the shrunk picture lacks is enlarged and added,
again and again. It changes what the small picture knows, the coarse parts, and leaves the drawn detail.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def held_to(images: Tensor, small: Tensor, num_rounds: int = 20) -> Tensor:
    """Change pictures (B, C, H, W) in [-1, 1] so that, shrunk, they are `small` (B, C, h, w) but for the clamp."""
    for _ in range(num_rounds):
        lacking = small - F.interpolate(images, size=small.shape[2:], mode="bicubic", antialias=True)
        images = (images + F.interpolate(lacking, size=images.shape[2:], mode="bicubic")).clamp(-1, 1)
    return images
