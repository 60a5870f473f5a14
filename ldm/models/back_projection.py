"""Back projection: change enlarged images so that they shrink to the small images that they were made from.

Irani and Peleg, Improving resolution by image registration (1991): the difference to the small image is enlarged and
added, again and again. It corrects low frequencies, which the small image determines, and keeps generated detail.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def back_project(images: Tensor, small: Tensor, num_rounds: int = 20) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] that shrink to `small` (B, C, h, w), except where they are clamped."""
    for _ in range(num_rounds):
        error = small - F.interpolate(images, size=small.shape[2:], mode="bicubic", antialias=True)
        images = (images + F.interpolate(error, size=images.shape[2:], mode="bicubic")).clamp(-1, 1)
    return images
