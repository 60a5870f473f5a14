"""Pictures to tensors: decode, scale, crop, mirror, x / 127.5 - 1 (the paper's preprocessing: sizes, crops, flips).

Randomness is a pure function of (seed, epoch, index): a `Draw` carries the three and gives the generator of its item,
so that no two workers, ranks or epochs repeat each other and any item can be made again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import UserError

__all__ = ["UNREADABLE", "Draw", "ImageTransform", "open_image"]

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_CROPS = ("center", "random", "none")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Draw(NamedTuple):
    """Name one item of one epoch of a run."""

    index: int
    epoch: int = 0
    seed: int = 0

    def generator(self) -> np.random.Generator:
        """Make the generator of this item."""
        return np.random.default_rng([self.seed, self.epoch, self.index])


def open_image(source: Path | bytes) -> Image.Image:
    """Decode a picture to mode L, RGB or F with values in 0..255.

    The orientation in EXIF is applied, transparency is laid on white, 16-bit greys become mode F without rounding.
    Raises one of UNREADABLE.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        return Image.fromarray(np.asarray(image).astype(np.float32) * np.float32(255 / 65535))
    if image.mode == "F":
        raise ValueError("floating-point pictures have no known range; convert to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")


class ImageTransform:
    """Turn a picture into float32 (channels, H, W) in [-1, 1].

    size: S or [H, W]. resize: the shortest side before cropping, in pixels; "size": the least that covers `size`;
    "none": the picture's own, so that a crop shows full resolution. A picture that does not cover `size` is enlarged.
    crop: "center", "random", or "none" to squeeze the whole picture to `size`. flip: probability of mirroring.
    interpolation: nearest, box, bilinear, hamming, bicubic or lanczos, antialiased except nearest. channels: 1 or 3.
    Raises UserError for other values.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        crop: str = "center",
        resize: int | str | None = "size",
        flip: float = 0.0,
        channels: int = 3,
        interpolation: str = "bicubic",
    ) -> None:
        self.height, self.width = _height_and_width(size)
        if crop not in _CROPS:
            raise UserError(f"data: crop {crop!r} is not one of {', '.join(_CROPS)}")
        if interpolation not in _FILTERS:
            raise UserError(f"data: interpolation {interpolation!r} is not one of {', '.join(_FILTERS)}")
        if not 0 <= flip <= 1 or channels not in (1, 3):
            raise UserError(f"data: needs 0 <= flip <= 1 and channels 1 or 3, not flip={flip}, channels={channels}")
        self.crop, self.flip, self.channels = crop, flip, channels
        self.shortest_side = _shortest_side(resize, min(self.height, self.width))
        self.filter = _FILTERS[interpolation]

    def enlarges(self, image: Image.Image) -> bool:
        """Tell whether the picture has fewer pixels than the size asks for."""
        return image.width < self.width or image.height < self.height

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Transform a picture as `open_image` gives it."""
        across, down, mirror = rng.random(3)  # always three draws, so that an option changes no other draw
        image = self._scaled(image)
        if self.crop != "none":
            x, y = image.width - self.width, image.height - self.height
            left, top = (round(x / 2), round(y / 2)) if self.crop == "center" else (_upto(x, across), _upto(y, down))
            image = image.crop((left, top, left + self.width, top + self.height))
        if mirror < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._tensor(image)

    def _scaled(self, image: Image.Image) -> Image.Image:
        if self.crop == "none":
            size = (self.width, self.height)
        else:
            cover = max(self.width / image.width, self.height / image.height)
            wanted = 1.0 if self.shortest_side is None else self.shortest_side / min(image.size)
            scale = max(cover, wanted)
            size = (max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale)))
        return image if size == image.size else image.resize(size, self.filter)

    def _tensor(self, image: Image.Image) -> Tensor:
        if image.mode != "F":
            image = image.convert("L" if self.channels == 1 else "RGB")
        values = np.clip(np.asarray(image, dtype=np.float32), 0, 255)  # bicubic overshoots in mode F
        tensor = torch.from_numpy(values / np.float32(127.5) - 1)
        if tensor.dim() == 2:
            return repeat(tensor, "h w -> c h w", c=self.channels).contiguous()  # (C, H, W)
        return rearrange(tensor, "h w c -> c h w").contiguous()  # (C, H, W)


def _upto(largest: int, share: float) -> int:
    return min(largest, math.floor(share * (largest + 1)))


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"data: size {size!r} is neither a positive number of pixels nor [height, width]")
    return sides[0], sides[1]


def _shortest_side(resize: int | str | None, least: int) -> int | None:
    """Give the wanted shortest side in pixels, 0 for the least that covers, None for the picture's own."""
    if resize == "size":
        return 0
    if resize in (None, "none"):
        return None
    if not isinstance(resize, int) or resize < least:
        raise UserError(f'data: resize {resize!r} is neither "size", "none" nor a number of pixels from {least} on')
    return resize
