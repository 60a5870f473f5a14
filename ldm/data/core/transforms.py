"""Images to tensors: resize, crop, flip, x / 127.5 - 1 (the paper's preprocessing).

Random numbers are a pure function of (seed, epoch, index), a `SampleKey`: workers, ranks and epochs never repeat each
other, and any item can be made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ldm.bounds import Fraction, Sides
from ldm.data.core.decoding import LUMA, UNREADABLE, DecodedImage, MultichannelImage, check_range, open_image
from ldm.errors import UserError

__all__ = ["UNREADABLE", "CropParams", "ImageTransform", "SampleKey", "open_image", "with_channels"]

_CROPS = ("center", "random", "random_size", "random_half", "none")
_FILTERS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}
_THIN = 32  # beyond this ratio of sides images are cropped before they are resized: 1x20,000 would become 256x5,120,000
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class SampleKey(NamedTuple):
    """One item of one epoch of a run; the seed of its random numbers."""

    index: int
    epoch: int = 0
    seed: int = 0

    def generator(self) -> np.random.Generator:
        """Return a new generator for the item."""
        return np.random.default_rng([self.seed, self.epoch, self.index])


class CropParams(NamedTuple):
    """The size to which the whole image is resized, the upper left corner of the crop in it, and whether to flip."""

    width: int
    height: int
    left: int = 0
    top: int = 0
    flip: bool = False


class ImageTransform:
    """Turn an image into float32 (channels, H, W) in [-1, 1]. Raises UserError for impossible options.

    Args:
        size: S or [H, W]. An image that does not cover it is enlarged.
        crop: "center"; "random"; "random_size", of any extent from `size` pixels to the whole image; "random_half",
            from half of the image to the whole; or "none", which squeezes the whole image to `size`.
        resize: the shortest side before "center" and "random" crops: a number of pixels, "size" for the smallest that
            covers `size`, or "none" to crop at full resolution.
        flip: probability of a horizontal flip.
        channels: 1 for grey, 3 for colours, 2 and 4 for these with alpha, or the number that the files have.
        interpolation: nearest, box, bilinear, hamming, bicubic or lanczos; antialiased except nearest.
        value_range: the values of black and white in arrays and in files of more than 8 bits, see `open_image`.
    """

    def __init__(
        self,
        size: Sides,
        crop: str = "center",
        resize: int | str | None = "size",
        flip: Fraction = 0.0,
        channels: int = 3,
        interpolation: str = "bicubic",
        value_range: Sequence[float] | None = None,
    ) -> None:
        self.height, self.width = _height_and_width(size)
        if crop not in _CROPS:
            raise UserError(f"data: crop {crop!r} is not one of {', '.join(_CROPS)}")
        if interpolation not in _FILTERS:
            raise UserError(f"data: interpolation {interpolation!r} is not one of {', '.join(_FILTERS)}")
        if not 0 <= flip <= 1 or not isinstance(channels, int) or channels < 1:
            raise UserError(f"data: needs 0 <= flip <= 1 and channels >= 1, not flip={flip}, channels={channels}")
        self.crop, self.flip, self.channels = crop, flip, channels
        self.shortest_side = _shortest_side(resize, min(self.height, self.width))
        self.filter = _FILTERS[interpolation]
        self.value_range = check_range(value_range)

    def open(self, source: Path | bytes) -> DecodedImage:
        """Decode a file with the channels and the value range of this transform, see `open_image`."""
        return open_image(source, self.channels, self.value_range)

    def enlarges(self, image: DecodedImage) -> bool:
        """Return whether the image has fewer pixels than `size`."""
        return image.width < self.width or image.height < self.height

    def __call__(self, image: DecodedImage, rng: np.random.Generator) -> Tensor:
        """Return a random crop of a decoded image."""
        return self.apply(image, self.sample_crop(image, rng))

    def sample_crop(self, image: DecodedImage, rng: np.random.Generator) -> CropParams:
        """Draw the crop of an image."""
        across, down, flip = rng.random(3)  # always three, so that one option does not change the draws of another
        if self.crop == "none":
            return CropParams(self.width, self.height, flip=bool(flip < self.flip))
        scale = self._scale(image, rng)
        width, height = max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale))
        x, y = width - self.width, height - self.height
        left, top = (round(x / 2), round(y / 2)) if self.crop == "center" else (_upto(x, across), _upto(y, down))
        return CropParams(width, height, left, top, bool(flip < self.flip))

    def apply(self, image: DecodedImage, crop: CropParams) -> Tensor:
        """Resize, crop and flip a decoded image: float32 (channels, H, W) in [-1, 1]."""
        left, top, right, bottom = crop.left, crop.top, crop.left + self.width, crop.top + self.height
        if image.size != crop[:2] and max(image.size) > _THIN * min(image.size):
            across, down = image.width / crop.width, image.height / crop.height
            box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
            image = image.resize((self.width, self.height), self.filter, box=box)
        else:
            image = image if image.size == crop[:2] else image.resize(crop[:2], self.filter)
            image = image.crop((left, top, right, bottom))
        if crop.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._tensor(image)

    def _scale(self, image: DecodedImage, rng: np.random.Generator) -> float:
        cover = max(self.width / image.width, self.height / image.height)
        if self.crop == "random_size":  # the extent of the crop is uniform between its two limits
            largest = max(cover, 1.0)
            return 1 / (1 / largest + rng.random() * (1 / cover - 1 / largest))
        if self.crop == "random_half":
            return 2 * cover / (1 + rng.random())
        wanted = 1.0 if self.shortest_side is None else self.shortest_side / min(image.size)
        return max(cover, wanted)

    def _tensor(self, image: DecodedImage) -> Tensor:
        image = with_channels(image, self.channels)
        values = image.array() if isinstance(image, MultichannelImage) else np.asarray(image, dtype=np.float32)
        values = np.clip(values, 0, 255)  # bicubic overshoots in floats
        tensor = torch.from_numpy(values / np.float32(127.5) - 1)
        if tensor.dim() == 2:
            return repeat(tensor, "h w -> c h w", c=self.channels).contiguous()  # (C, H, W)
        return rearrange(tensor, "h w c -> c h w").contiguous()  # (C, H, W)


def with_channels(image: DecodedImage, channels: int) -> DecodedImage:
    """Convert between grey and colours. Grey floats stay as they are if colours are wanted.

    Raises UserError where channels would be lost or invented.
    """
    have = len(image.getbands())
    if have == channels or (image.mode, channels) == ("F", 3):
        return image
    if channels in _MODES and image.mode in _MODES.values():
        return image.convert(_MODES[channels])
    if channels == 1 and have == 3:
        return Image.fromarray(image.array() @ LUMA)
    raise UserError(
        f"an image of {have} channels does not go with channels={channels}; set channels={have} in the data set, and "
        "in_channels and out_channels of the autoencoder"
    )


def _upto(largest: int, fraction: float) -> int:
    return min(largest, math.floor(fraction * (largest + 1)))


def _height_and_width(size: Sides) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"data: size {size!r} is neither a positive number of pixels nor [height, width]")
    return sides[0], sides[1]


def _shortest_side(resize: int | str | None, least: int) -> int | None:
    """Return the shortest side in pixels, 0 for the least that covers `size`, None for the image's own."""
    if resize == "size":
        return 0
    if resize in (None, "none"):
        return None
    if not isinstance(resize, int) or resize < least:
        raise UserError(f'data: resize {resize!r} is neither "size", "none" nor a number of pixels from {least} on')
    return resize
