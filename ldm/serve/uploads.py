"""Files that a visitor sends: images, masks and maps, whose size is checked before a pixel is decoded."""

from __future__ import annotations

import base64
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ldm.data.core.decoding import UNREADABLE, Range, open_image, stream_of
from ldm.data.core.pixels import to_bytes
from ldm.data.core.transforms import ImageTransform
from ldm.data.readers import single_images
from ldm.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # what browsers show; no other decoder is reached
LARGEST_SIDE = 2048


class Upload(bytes):
    """The content of a file; its text is the field of the order that brought it, for messages."""

    field: str

    @classmethod
    def of(cls, field: str, text: str) -> Upload:
        """Return the file in `data:...;base64,...`. UserError for anything else, and for what is no image of a size."""
        try:
            upload = cls(base64.b64decode(text.partition(",")[2], validate=True))
        except ValueError as error:
            raise UserError(f"{field}: the upload is damaged") from error
        upload.field = field
        upload.check()
        return upload

    def __str__(self) -> str:
        """Return the name of the field."""
        return self.field

    def check(self) -> None:
        """Read the header alone. UserError unless it is an image of at most LARGEST_SIDE pixels on a side."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            try:
                with Image.open(stream_of(self), formats=FORMATS) as image:
                    width, height = image.size
            except UnidentifiedImageError as error:
                kinds = ", ".join(FORMATS)
                raise UserError(f"{self}: the file is no image that can be read here; use {kinds}") from error
            except UNREADABLE as error:
                raise UserError(f"{self}: the file is damaged, or too large when decoded") from error
        if max(width, height) > LARGEST_SIDE:
            raise UserError(f"{self}: {width} x {height} pixels; at most {LARGEST_SIDE} on a side are taken")


def image_of(upload: Upload, channels: int, value_range: Range | None = None) -> Tensor:
    """Return the bytes (channels, H, W) of an image at its own size. UserError for a damaged one."""
    try:
        return single_images.read_image(upload, channels, value_range=value_range)
    except UNREADABLE as error:
        raise _damaged(upload) from error


def fitted_image(upload: Upload, channels: int, size: tuple[int, int], value_range: Range | None = None) -> Tensor:
    """Return the bytes (channels, H, W) of an image scaled and cropped to a size, as data sets do by default."""
    transform = ImageTransform(list(size), channels=channels, value_range=value_range)
    try:
        return to_bytes(transform(open_image(upload, channels, value_range), np.random.default_rng(0)))
    except UNREADABLE as error:
        raise _damaged(upload) from error
    except UserError as error:
        raise UserError(f"{upload}: {error}") from error


def hole_of(upload: Upload, size: tuple[int, int]) -> Tensor:
    """Return the hole of a mask for an image of (height, width): bool (1, H, W). UserError as `read_mask` has it."""
    try:
        return single_images.read_mask(upload, size)
    except UNREADABLE as error:
        raise _damaged(upload) from error


def indices_of(upload: Upload) -> Tensor:
    """Return a map of class indices, int64 (H, W); of one that a browser painted, the grey of each pixel is its class.

    UserError for colours and lossy files.
    """
    try:
        with Image.open(stream_of(upload)) as image:
            pixels = np.asarray(image) if image.format == "PNG" and image.mode in ("RGB", "RGBA") else None
        if pixels is not None and (pixels[..., :3] == pixels[..., :1]).all():
            return torch.from_numpy(pixels[..., 0].astype(np.int64))
        return single_images.read_indices(upload)
    except UNREADABLE as error:
        raise _damaged(upload) from error


def _damaged(upload: Upload) -> UserError:
    return UserError(f"{upload}: the file is damaged; save it again")
