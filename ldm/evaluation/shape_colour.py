"""Features of drawings without a network: where which colours are, and which way the outlines run.

A thumbnail of colours beside a histogram of oriented gradients (Dalal & Triggs, CVPR 2005), each of norm 1. For sets of
drawings on one background, whose concepts no network at hand knows; not for photos. docs/results.md has what it finds.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.extractors import Features

__all__ = ["ShapeColour", "oriented_gradients"]

_SIDE, _CELLS, _BINS, _EDGES = 64, 8, 8, 1.0
_BACKGROUND = 1.0  # white, so that what is not drawn adds nothing to a distance


def oriented_gradients(images: Tensor, cells: int, bins: int) -> Tensor:
    """Return the strength of the gradients of grey images (B, S, S) by place and direction: (B, bins, cells, cells).

    Directions are without sign, and shared between the two nearest bins.
    """
    down, across = torch.gradient(images, dim=(-2, -1))
    position = torch.atan2(down, across).remainder(math.pi) * (bins / math.pi)  # in [0, bins]
    distance = (position[:, None] - torch.arange(bins, device=images.device).view(-1, 1, 1)).abs()  # (B, bins, S, S)
    shares = (1 - torch.minimum(distance, bins - distance)).clamp(min=0)
    return F.adaptive_avg_pool2d(shares * torch.hypot(down, across)[:, None], cells)


class ShapeColour:
    """Colours on a grid of 8x8 beside the square roots of the gradients' histogram there, (B, 704)."""

    name = "shape_colour"
    resize = f"mean of areas to {_SIDE}x{_SIDE}"
    hash = hashlib.sha256(f"{_SIDE} {_CELLS} {_BINS} {_EDGES}".encode()).hexdigest()

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> ShapeColour:
        """Move to a device and return itself."""
        self.device = torch.device(device)
        return self

    def __call__(self, images: Tensor) -> Features:
        """Return float32 features on the CPU of images, uint8 (B, 3, H, W)."""
        if images.shape[1] != 3:
            raise UserError(f"{self.name}: images of {images.shape[1]} channels; features are of 3")
        small = F.adaptive_avg_pool2d(images.to(self.device).float() / 255, _SIDE)  # (B, 3, S, S)
        colours = F.adaptive_avg_pool2d(small - _BACKGROUND, _CELLS).flatten(1)
        edges = oriented_gradients(small.mean(1), _CELLS, _BINS).sqrt().flatten(1)
        return Features(torch.cat([F.normalize(colours, dim=1), _EDGES * F.normalize(edges, dim=1)], dim=1).cpu())
