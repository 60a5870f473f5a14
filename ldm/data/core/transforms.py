"""Pictures to tensors: scale, crop, mirror, x / 127.5 - 1 (the paper's preprocessing: sizes, crops, flips).

Randomness is a pure function of (seed, epoch, index): a `Draw` carries the three and gives the generator of its item,
so that no two workers, ranks or epochs repeat each other and any item can be made again.
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

from ldm.data.core.decoding import LUMA, UNREADABLE, Picture, Planes, check_range, open_image
from ldm.errors import UserError

__all__ = ["UNREADABLE", "Draw", "ImageTransform", "View", "open_image", "with_channels"]

_CROPS = ("center", "random", "random_size", "random_half", "none")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class Draw(NamedTuple):
    """Name one item of one epoch of a run."""

    index: int
    epoch: int = 0
    seed: int = 0

    def generator(self) -> np.random.Generator:
        """Make the generator of this item."""
        return np.random.default_rng([self.seed, self.epoch, self.index])


class View(NamedTuple):
    """What an item shows of its picture: the size that the whole is scaled to, the crop's corner in that, mirroring."""

    width: int
    height: int
    left: int = 0
    top: int = 0
    mirrored: bool = False


class ImageTransform:
    """Turn a picture into float32 (channels, H, W) in [-1, 1].

    size: S or [H, W]. resize: the shortest side before cropping, in pixels; "size": the least that covers `size`;
    "none": the picture's own, so that a crop shows full resolution. A picture that does not cover `size` is enlarged.
    crop: "center", "random", "random_size" for any extent from `size` pixels to the whole, "random_half" for any from
    half of the whole (both whatever resize says), or "none" to squeeze the whole picture to `size`. flip: probability
    of mirroring.
    interpolation: nearest, box, bilinear, hamming, bicubic or lanczos, antialiased except nearest. channels: 1 for
    grey, 3 for colours, 2 and 4 for these with transparency, or what the files have. value_range: the values of black
    and white in arrays and files of more than 8 bits, see `open_image`. Raises UserError for other values.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        crop: str = "center",
        resize: int | str | None = "size",
        flip: float = 0.0,
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

    def open(self, source: Path | bytes) -> Picture:
        """Decode a picture as the number of channels and the range ask for, see `open_image`."""
        return open_image(source, self.channels, self.value_range)

    def enlarges(self, image: Picture) -> bool:
        """Return whether the picture has fewer pixels than the size asks for."""
        return image.width < self.width or image.height < self.height

    def __call__(self, image: Picture, rng: np.random.Generator) -> Tensor:
        """Transform a picture as `open_image` gives it."""
        return self.show(image, self.view(image, rng))

    def view(self, image: Picture, rng: np.random.Generator) -> View:
        """Draw what to show of a picture."""
        across, down, mirror = rng.random(3)  # always three draws, so that an option changes no other draw
        if self.crop == "none":
            return View(self.width, self.height, mirrored=bool(mirror < self.flip))
        scale = self._scale(image, rng)
        width, height = max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale))
        x, y = width - self.width, height - self.height
        left, top = (round(x / 2), round(y / 2)) if self.crop == "center" else (_upto(x, across), _upto(y, down))
        return View(width, height, left, top, bool(mirror < self.flip))

    def show(self, image: Picture, view: View) -> Tensor:
        """Scale, crop and mirror a picture as a view says."""
        if image.size != view[:2]:
            image = image.resize(view[:2], self.filter)
        image = image.crop((view.left, view.top, view.left + self.width, view.top + self.height))
        if view.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._tensor(image)

    def _scale(self, image: Picture, rng: np.random.Generator) -> float:
        cover = max(self.width / image.width, self.height / image.height)
        if self.crop == "random_size":  # the extent of the crop is uniform between its two limits
            largest = max(cover, 1.0)
            return 1 / (1 / largest + rng.random() * (1 / cover - 1 / largest))
        if self.crop == "random_half":
            return 2 * cover / (1 + rng.random())
        wanted = 1.0 if self.shortest_side is None else self.shortest_side / min(image.size)
        return max(cover, wanted)

    def _tensor(self, image: Picture) -> Tensor:
        image = with_channels(image, self.channels)
        values = image.array() if isinstance(image, Planes) else np.asarray(image, dtype=np.float32)
        values = np.clip(values, 0, 255)  # bicubic overshoots in floats
        tensor = torch.from_numpy(values / np.float32(127.5) - 1)
        if tensor.dim() == 2:
            return repeat(tensor, "h w -> c h w", c=self.channels).contiguous()  # (C, H, W)
        return rearrange(tensor, "h w c -> c h w").contiguous()  # (C, H, W)


def with_channels(image: Picture, channels: int) -> Picture:
    """Turn grey into colours and the other way round; a grey of floats that becomes colours is left as it is.

    Raises UserError where a picture would lose or invent channels.
    """
    have = len(image.getbands())
    if have == channels or (image.mode, channels) == ("F", 3):
        return image
    if channels in _MODES and image.mode in ("L", "LA", "RGB", "RGBA"):
        return image.convert(_MODES[channels])
    if channels == 1 and have == 3:
        return Image.fromarray(image.array() @ LUMA)
    raise UserError(
        f"a picture of {have} channels does not go with channels={channels}; set channels={have} in the data set, and "
        "in_channels and out_channels of the autoencoder"
    )


def _upto(largest: int, share: float) -> int:
    return min(largest, math.floor(share * (largest + 1)))


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"data: size {size!r} is neither a positive number of pixels nor [height, width]")
    return sides[0], sides[1]


def _shortest_side(resize: int | str | None, least: int) -> int | None:
    """Return the wanted shortest side in pixels, 0 for the least that covers, None for the picture's own."""
    if resize == "size":
        return 0
    if resize in (None, "none"):
        return None
    if not isinstance(resize, int) or resize < least:
        raise UserError(f'data: resize {resize!r} is neither "size", "none" nor a number of pixels from {least} on')
    return resize
