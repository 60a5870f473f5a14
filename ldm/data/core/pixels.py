"""Pixels as floats in [-1, 1], as networks see them, and as bytes, as files hold them."""

import torch
from torch import Tensor

__all__ = ["from_bytes", "to_bytes"]


def to_bytes(images: Tensor) -> Tensor:
    """Turn images in [-1, 1] into bytes, rounded to nearest: pictures of bytes come back as they were."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Turn bytes into images in [-1, 1]."""
    return images.float() / 127.5 - 1
