"""Read single images, masks and maps of classes from files, as data sets read theirs.

Images are uint8 (C, H, W) here, so that pixels which a program must not change stay exact; `from_bytes` makes floats.
In the place of a path may stand the content of a file, of a class whose text names it in messages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.core.decoding import MultichannelImage, Range, open_image
from ldm.data.core.pixels import to_bytes
from ldm.data.core.transforms import CropParams, ImageTransform
from ldm.data.image_pairs import paired_files
from ldm.errors import UserError, shown

Margins = tuple[int, int, int, int]  # left, top, right, bottom
_MOST_DIGITS = 5  # of a margin

Size = tuple[int | None, int | None]  # (height, width); None leaves a side as it is


def read_image(
    path: Path | bytes, channels: int, size: Size = (None, None), value_range: Range | None = None
) -> Tensor:
    """Read an image as data sets do, as uint8 (channels, H, W); sides that `size` gives are resized.

    value_range: see `open_image`. Raises UserError where channels would be lost or invented, and one of UNREADABLE.
    """
    image = open_image(path, channels, value_range)
    target = (size[0] or image.height, size[1] or image.width)
    transform = ImageTransform(target, crop="none", channels=channels)
    try:
        return to_bytes(transform.apply(image, CropParams(target[1], target[0])))  # (C, H, W)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def describe_loss(path: Path, channels: int, value_range: Range | None = None) -> str | None:
    """Return what `read_image` loses of an image, None if nothing. Raises one of UNREADABLE."""
    image = open_image(path, channels, value_range)
    values = image.array() if isinstance(image, MultichannelImage) else np.asarray(image)
    if (values != values.round()).any():
        return "has more than 8 bits, and is rounded to 8"
    if channels in (1, 3):
        whole = open_image(path, 4, value_range)
        if whole.mode == "RGBA" and np.asarray(whole)[..., 3].min() < 255:
            return "is transparent, and is laid on white"
    return None


def read_mask(path: Path | bytes, size: tuple[int, int], target: Size = (None, None)) -> Tensor:
    """Read the mask of an image of `size` as bool (1, H, W), True in the hole, see `paired_files.read_hole`.

    Sides that `target` gives are resized. Raises UserError for a mask of another size, and for one that is hole
    everywhere or nowhere, and one of UNREADABLE.
    """
    hole, problem = paired_files.read_hole(path)
    if hole.shape != tuple(size):
        height, width = hole.shape
        raise UserError(f"{path}: the mask is {width}x{height}, its image {size[1]}x{size[0]}; make them equal")
    if problem is not None:
        raise UserError(f"{path}: {problem}")
    return _resized(hole, target)[None]  # (1, H, W)


def read_indices(path: Path | bytes, size: Size = (None, None)) -> Tensor:
    """Read a map of class indices as data sets do, int64 (H, W); sides that `size` gives are resized.

    Raises UserError for colours and lossy files, and one of UNREADABLE.
    """
    return _resized(paired_files.read_indices(path), size)


def _resized(values: np.ndarray, size: Size) -> Tensor:
    """Resize (H, W) by nearest neighbours to the sides that `size` gives."""
    height, width = size[0] or values.shape[0], size[1] or values.shape[1]
    resized = paired_files.crop_index_map(values, CropParams(width, height), height, width)
    return torch.from_numpy(np.ascontiguousarray(resized))  # (H, W)


def padded(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (..., H, W) until `multiple` divides both sides."""
    for axis in (-2, -1):
        side = image.shape[axis]
        index = torch.arange(-(-side // multiple) * multiple, device=image.device).clamp(max=side - 1)
        image = image.index_select(axis, index)
    return image


def margins_of(text: str) -> Margins:
    """Return (left, top, right, bottom) in pixels of a text "L,T,R,B". UserError for another, and for none at all."""
    parts = text.split(",")
    margins = tuple(int(part) for part in parts if part.strip().isdecimal() and len(part) <= _MOST_DIGITS)
    if len(parts) != 4 or len(margins) != 4 or not any(margins):
        raise UserError(f"--outpaint {shown(text)}: give left,top,right,bottom in pixels, such as 0,0,128,0")
    return margins


def extended(image: Tensor, margins: Margins) -> tuple[Tensor, Tensor]:
    """Return an image (C, H, W) on a canvas with (left, top, right, bottom) more pixels, and what is new, bool."""
    left, top, right, bottom = margins
    sides = (left, right, top, bottom)
    return F.pad(image, sides), F.pad(torch.zeros_like(image[:1], dtype=torch.bool), sides, value=True)


def cropped(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop (..., H, W) to `size` at the upper left."""
    return image[..., : size[0], : size[1]]
