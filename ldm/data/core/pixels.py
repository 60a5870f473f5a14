"""Pixels as floats in [-1, 1], as networks read them, and as bytes, as files hold them."""

import torch
from torch import Tensor

__all__ = ["from_bytes", "to_bytes", "to_bytes_truncated"]


def to_bytes(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8, rounded to nearest: the one rule for what is written and what is measured."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_bytes_truncated(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to uint8, truncated: the rule of the published samples, for fidelity to them alone."""
    return (((images.float() + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
