"""Sizes and crops of the training images as a condition: a vector of sinusoidal embeddings (SDXL, arXiv 2307.01952).

A model that is told from what size an image was scaled, and where it was cropped, can be asked for one of full size,
with its subject whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.aliases import Batch
from ldm.bounds import Fraction, Size
from ldm.conditioning.base import Conditioner
from ldm.networks.embeddings import timestep_embedding
from ldm.transfer import sent


class SizeConditioner(Conditioner):
    """Embed two numbers of pixels, (height, width) or (top, left), as a vector (B, 2 dim). 'No condition' is zeros.

    It is kept in guidance. Where a batch has none it is the size of the image, or with `is_corner` (0, 0).
    """

    is_kept = True

    def __init__(
        self,
        key: str = "original_size",
        dim: Size = 256,
        is_corner: bool = False,
        image_key: str = "image",
        drop_rate: Fraction = 0.0,
    ) -> None:
        super().__init__(key, "vector", drop_rate, trainable=False)
        self.dim, self.is_corner, self.image_key, self.width = dim, is_corner, image_key, 2 * dim

    def value(self, batch: Batch) -> Tensor | Sequence[Sequence[float]]:
        """Return the numbers of a batch, or those of its images."""
        if self.key in batch or self.image_key not in batch:
            return self._entry(batch, self.key)
        images = batch[self.image_key]
        return [self.entry_for(tuple(images.shape[2:]))] * len(images)

    def embed(self, value: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Return embedded numbers (B, 2): (B, 2 dim)."""
        numbers = sent(torch.as_tensor(value, dtype=torch.float32), self.device)
        return timestep_embedding(numbers.flatten(), self.dim).view(len(numbers), -1)

    def null(self, n: int) -> Tensor:
        """Return zeros (n, 2 dim)."""
        return self._device_buffer.new_zeros(n, self.width)

    def entry_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size of an image, or its corner."""
        return (0, 0) if self.is_corner else size
