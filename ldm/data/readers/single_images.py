"""Read single images, masks and maps of classes from files, as data sets read theirs.

Images are uint8 (C, H, W) here, so that pixels which a program must not change stay exact; `from_bytes` makes floats.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.core.decoding import MultichannelImage, Range, open_image
from ldm.data.core.pixels import to_bytes
from ldm.data.core.transforms import CropParams, ImageTransform
from ldm.data.image_pairs import paired_files
from ldm.errors import UserError

Size = tuple[int | None, int | None]  # (height, width); None leaves a side as it is


def read_image(path: Path, channels: int, size: Size = (None, None), value_range: Range | None = None) -> Tensor:
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


def read_mask(path: Path, size: tuple[int, int], target: Size = (None, None)) -> Tensor:
    """Read the mask of an image of `size` as bool (1, H, W), True in the hole, see `_mask_values`.

    Sides that `target` gives are resized. Raises UserError for a mask of another size or without a hole, and one of
    UNREADABLE.
    """
    with Image.open(path) as opened:
        lossless = opened.format not in paired_files.LOSSY
        image = ImageOps.exif_transpose(opened)
    if (image.height, image.width) != tuple(size):
        raise UserError(
            f"{path}: the mask is {image.width}x{image.height}, its image {size[1]}x{size[0]}; make them equal"
        )
    values, middle = _mask_values(image, lossless)
    hole = np.array(_scaled(Image.fromarray((values > middle).astype(np.uint8)), target)) > 0
    if not hole.any():
        raise UserError(
            f"{path}: a mask without a hole, its values are {values.min():g} to {values.max():g}; a hole is what is "
            "white (128 and more of 255), 1 in masks of 0 and 1, and not index 0 in palettes"
        )
    return torch.from_numpy(hole)[None]  # (1, H, W)


def _mask_values(image: Image.Image, lossless: bool) -> tuple[np.ndarray, float]:
    """Return the values of a mask (H, W), and the threshold above which they are hole.

    The threshold is the middle of the smallest range that has them: 0..1, 0..255 or 0..65535; index 0 of a palette.
    """
    if image.mode in ("P", "PA"):
        return np.asarray(image.getchannel("P")), 0
    is_deep = image.mode.startswith("I") or image.mode == "F"
    values = np.asarray(image if is_deep else image.convert("L"))
    ranges = (1, 255, 65535) if lossless else (255,)  # in JPEG a 1 can be left where nothing is white
    return values, next((high for high in ranges if values.max() <= high), values.max()) / 2


def read_indices(path: Path, size: Size = (None, None)) -> Tensor:
    """Read a map of class indices as data sets do, int64 (H, W); sides that `size` gives are resized.

    Raises UserError for colours and lossy files, and one of UNREADABLE.
    """
    indices = paired_files.read_indices(path)
    height, width = size[0] or indices.shape[0], size[1] or indices.shape[1]
    resized = paired_files.crop_index_map(indices, CropParams(width, height), height, width)
    return torch.from_numpy(np.ascontiguousarray(resized))  # (H, W)


def _scaled(image: Image.Image, size: Size) -> Image.Image:
    height, width = size[0] or image.height, size[1] or image.width
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.NEAREST)


def padded(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (..., H, W) until `multiple` divides both sides."""
    for axis in (-2, -1):
        side = image.shape[axis]
        index = torch.arange(-(-side // multiple) * multiple, device=image.device).clamp(max=side - 1)
        image = image.index_select(axis, index)
    return image


def cropped(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop (..., H, W) to `size` at the upper left."""
    return image[..., : size[0], : size[1]]
