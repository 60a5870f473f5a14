"""One image to draw, of any task, and several of them in a batch of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.models.generate import Request
from ldm.models.guidance import Guidance
from ldm.models.inpainting import InpaintingTarget
from ldm.sampling.base import identity


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class ImageRequest:
    """One image to draw, and the file that it becomes.

    Args:
        size: (height, width).
        conditions: Batch key -> the entry of this image.
        details: Further entries of the record.
        name: Name of the file; without it images are numbered.
        source: Bytes (C, H, W) that are shown left of the image in the grid.
        target: Image (C, H, W) in [-1, 1] and mask (1, H, W), above 0 in the hole, for models without a mask.
        image: Image (C, H, W) in [-1, 1] to start from instead of from noise.
        negative: Like `conditions`, to be guided away from.
        finish: What happens to the bytes (C, H, W) of the image before they are written.
    """

    size: tuple[int, int]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    source: Tensor | None = None
    target: tuple[Tensor, Tensor] | None = None
    image: Tensor | None = None
    negative: Mapping[str, Any] | None = None
    finish: Callable[[Tensor], Tensor] = identity


def joined(
    batch: Sequence[ImageRequest], seed: int, guidance: Guidance | float = 1.0, autocast: torch.dtype | None = None
) -> Request:
    """Return the request of a batch of images of one size, with the seeds seed, seed + 1, ..."""
    first, target = batch[0], None
    conditions = {key: _collated([each.conditions[key] for each in batch]) for key in first.conditions}
    negative = first.negative and {key: _collated([each.negative[key] for each in batch]) for key in first.negative}
    images = None if first.image is None else torch.stack([each.image for each in batch])
    if first.target is not None:
        target = InpaintingTarget(*map(torch.stack, zip(*(each.target for each in batch), strict=True)))
    seeds = range(seed, seed + len(batch))
    return Request(seeds, first.size, conditions, guidance, len(batch), autocast, target, images, negative)


def _collated(entries: list[Any]) -> list[Any] | Tensor:
    return torch.stack(entries) if isinstance(entries[0], Tensor) else entries
