"""How much of each spatial frequency an autoencoder keeps: power spectra averaged over rings of equal frequency.

A window of Hann keeps the borders, which do not meet, from leaking into high frequencies and hiding what is lost there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BANDS", "kept_up_to", "radial_power"]

BANDS = 16  # of equal width, from 0 to half a cycle a pixel (Nyquist)


def radial_power(images: Tensor, bands: int = BANDS) -> Tensor:
    """Return the power of images (B, C, H, W) in rings of equal frequency, means over ring and channels: (B, bands).

    Each image is taken without its mean. The corners of the plane, beyond Nyquist, are left out; a ring without any
    frequency, in small images, has power 0.
    """
    height, width = images.shape[-2:]
    window = torch.outer(*(torch.hann_window(side, periodic=False, dtype=torch.float64) for side in (height, width)))
    x = images.detach().cpu().double()
    x = (x - x.mean((-2, -1), keepdim=True)) * window
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean(1).flatten(1)  # (B, H * W)
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    radius = torch.hypot(rows[:, None], columns[None, :]).flatten()  # cycles a pixel
    inside = radius <= 0.5
    ring = (radius[inside] * 2 * bands).long().clamp(max=bands - 1)
    sums = torch.zeros(len(x), bands, dtype=torch.float64).index_add_(1, ring, power[:, inside])
    return sums / torch.bincount(ring, minlength=bands).clamp(min=1)


def kept_up_to(original: Sequence[float], rebuilt: Sequence[float], share: float = 0.5) -> float:
    """Return the frequency, in cycles a pixel, below which every band keeps at least a share of its power: 0 to 0.5."""
    width = 0.5 / len(original)
    for number, (before, after) in enumerate(zip(original, rebuilt, strict=True)):
        if after < share * before:
            return number * width
    return 0.5
