"""Files to pictures: what PIL reads, 16-bit colours, and arrays of any number of channels (.npy, TIFF).

A picture is a PIL image, or `Planes` where PIL has no mode for it; its values are 0..255 in either case, as floats
where the file has more than 8 bits. An orientation in EXIF is applied.
"""

from __future__ import annotations

import io
import struct
import tokenize
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ldm.errors import UserError

__all__ = ["LUMA", "UNREADABLE", "Picture", "Planes", "Range", "check_range", "open_image"]

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
Range = tuple[float, float]
_NUMPY, _TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FULL = {np.dtype(np.uint8): (0, 255), np.dtype(np.uint16): (0, 65535)}
_WITH_ALPHA = (2, 4)  # numbers of channels whose last one is alpha
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA = 258, 262, 277, 338  # tags of TIFF
_GREY, _RGB = (0, 1), 2  # photometric interpretations of TIFF
_ALPHA = (1, 2, 999)  # kinds of extra samples of TIFF: associated and unassociated alpha, and what Corel writes
_LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}  # how PNG stores 16 bits -> what makes PIL give the others
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as PIL has it for 8 bits
_GREY_ALPHA = "LA;16B"
# What readers raise on damaged files; MemoryError where a header declares more than there is room for.
_DAMAGE = (struct.error, zlib.error, tokenize.TokenError, LookupError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Planes:
    """Hold a picture of any number of channels as PIL images in mode F, values 0..255; used like a PIL image."""

    planes: tuple[Image.Image, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> Planes:
        """Split an array (H, W, C)."""
        return cls(tuple(Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(array, -1, 0)))

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height."""
        return self.planes[0].size

    @property
    def width(self) -> int:
        """Return the width in pixels."""
        return self.planes[0].width

    @property
    def height(self) -> int:
        """Return the height in pixels."""
        return self.planes[0].height

    @property
    def mode(self) -> str:
        """Name the kind of picture, as PIL does."""
        return "planes"

    def getbands(self) -> tuple[str, ...]:
        """Name the channels by their numbers."""
        return tuple(map(str, range(len(self.planes))))

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Planes:
        """Resize every channel."""
        return Planes(tuple(plane.resize(size, resample) for plane in self.planes))

    def crop(self, box: tuple[int, int, int, int]) -> Planes:
        """Crop every channel."""
        return Planes(tuple(plane.crop(box) for plane in self.planes))

    def transpose(self, method: Image.Transpose) -> Planes:
        """Mirror or turn every channel."""
        return Planes(tuple(plane.transpose(method) for plane in self.planes))

    def array(self) -> np.ndarray:
        """Return the values, float32 (H, W, C)."""
        return np.stack([np.asarray(plane) for plane in self.planes], axis=-1)


Picture = Image.Image | Planes


def check_range(value_range: Sequence[float] | None) -> Range | None:
    """Return a range as a pair. Raises UserError unless it is None or [low, high]."""
    if value_range is None:
        return None
    try:
        low, high = (float(value) for value in value_range)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high:
        raise UserError(f"data: value_range {value_range!r} is not [low, high], the values of black and white")
    return low, high


def open_image(source: Path | bytes, channels: int = 3, value_range: Range | None = None) -> Picture:
    """Decode a picture to mode L, LA, RGB, RGBA or F, or to Planes, with values in 0..255.

    channels: how many are wanted. With 2 or 4 of them transparency is kept, otherwise it is laid on white; unless it is
    1 or 3, all pages of a grey TIFF are read. value_range: the values of black and white in arrays and files of more
    than 8 bits; by default 0 and 65535 in 16 bits, 0 and 1 in floats. Arrays (.npy, TIFF) are (H, W) or (H, W, C).
    Raises one of UNREADABLE, or UserError if a package is missing.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            start = stream.read(8)
            stream.seek(0)
            if start.startswith(_NUMPY):
                return _scaled(np.load(stream, allow_pickle=False), value_range)
            if start[:4] in _TIFF and _is_beyond_pillow(stream, channels):
                return _read_tiff(stream, channels, value_range)
            return _read_picture(stream, channels, value_range)
    except UnidentifiedImageError as error:  # whose text is about an object in memory
        raise OSError("is no picture of a known format") from error
    except _DAMAGE as error:
        raise OSError(f"damaged ({type(error).__name__}: {error})") from error


def _read_picture(stream: BinaryIO, channels: int, value_range: Range | None) -> Picture:
    stream.seek(0)
    with Image.open(stream) as opened:
        rawmode = opened.tile[0][3] if opened.format == "PNG" and opened.tile else None
        if rawmode in (*_LOW_BYTES, _GREY_ALPHA) and "transparency" not in opened.info:
            return _colours(_sixteen_bits(stream, rawmode), channels, value_range)
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        is_short = image.mode.startswith("I") and array.min() >= 0 and array.max() <= 65535
        if is_short:
            return _colours(array.astype(np.uint16)[..., None], channels, value_range)
        return _scaled(array, value_range)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels in _WITH_ALPHA:
            return image
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")


def _sixteen_bits(stream: BinaryIO, rawmode: str) -> np.ndarray:
    """Read the colours of a 16-bit PNG, uint16 (H, W, C), of which PIL by itself keeps the high bytes only."""
    if rawmode == _GREY_ALPHA:
        pairs = _decoded_as(stream, "RGBA")  # (H, W, 4): high and low byte of grey, high and low byte of alpha
        return pairs[..., 0::2] * 256 + pairs[..., 1::2]
    return _decoded_as(stream, rawmode) * 256 + _decoded_as(stream, _LOW_BYTES[rawmode])


def _decoded_as(stream: BinaryIO, rawmode: str) -> np.ndarray:
    stream.seek(0)
    with Image.open(stream) as opened:
        opened.tile = [ImageFile._Tile(*tile[:3], rawmode) for tile in opened.tile]
        opened.load()
        return np.asarray(ImageOps.exif_transpose(opened)).astype(np.uint16)


def _is_beyond_pillow(stream: BinaryIO, channels: int) -> bool:
    """Return whether PIL would refuse a TIFF, round it to 8 bits, or leave pages out."""
    header = stream.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header + (stream.read(8) if header[2] == 43 else b""))
    stream.seek(tags.next)
    tags.load(stream)
    samples, bits = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,)))
    if samples > 4 or (samples > 1 and bits > 8) or (channels not in (1, 3) and _num_pages(stream) > 1):
        return True
    colours = tags.get(_PHOTOMETRIC)
    if samples not in _WITH_ALPHA or colours not in (*_GREY, _RGB):
        return False
    is_refused, loses_last = samples == 4 and colours in _GREY, not _ends_in_alpha(colours, tags.get(_EXTRA, ()))
    return is_refused or (loses_last and samples == channels)


def _ends_in_alpha(photometric: int, extra: Sequence[int]) -> bool:
    """Return whether the last sample is alpha; beside RGB one of no declared kind is taken for it, as PIL does."""
    return extra[-1] in _ALPHA if extra else photometric == _RGB


def _read_tiff(stream: BinaryIO, channels: int, value_range: Range | None) -> Picture:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            "data: TIFF of more than 4 channels, of several pages or with 16-bit colours needs the package tifffile "
            "(extra `data`): pip install tifffile; or save arrays as .npy"
        ) from error
    _num_pages(stream)  # since tifffile leaves out those beyond the end of a file that is cut off
    stream.seek(0)
    with tifffile.TiffFile(stream) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        array, axes = series.asarray(), series.axes
    if array.ndim > 3 or not {"Y", "X"} <= set(axes):
        raise ValueError(f"a TIFF with the axes {axes} is no picture")
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (0, 1))
    if _ends_in_alpha(page.photometric, page.extrasamples):
        return _over_white(array, channels, value_range)
    is_colour = page.photometric == _RGB and channels in (1, 3)
    return _scaled(array[..., :3] if is_colour else array, value_range)


def _num_pages(stream: BinaryIO) -> int:
    """Count the pages of a TIFF. Raises struct.error where one of them is beyond the end of the file."""
    stream.seek(0)
    start = stream.read(16)
    order, is_big = ("<" if start.startswith(b"II") else ">"), start[2:4] in (b"+\0", b"\0+")
    count_format, entry, next_format = (f"{order}Q", 20, f"{order}Q") if is_big else (f"{order}H", 12, f"{order}I")
    (offset,) = struct.unpack_from(next_format, start, 8 if is_big else 4)
    seen: set[int] = set()
    while offset and offset not in seen:
        seen.add(offset)
        stream.seek(offset)
        (count,) = struct.unpack(count_format, stream.read(struct.calcsize(count_format)))
        stream.seek(count * entry, io.SEEK_CUR)
        (offset,) = struct.unpack(next_format, stream.read(struct.calcsize(next_format)))
    return len(seen)


def _colours(array: np.ndarray, channels: int, value_range: Range | None) -> Picture:
    """Make a picture of 16-bit greys or colours (H, W, 1 to 4), whose alpha is added or taken away as wanted."""
    if channels not in _WITH_ALPHA:
        return _over_white(array, channels, value_range)
    has_alpha = array.shape[-1] in _WITH_ALPHA
    colours = array[..., :-1] if has_alpha else array
    alpha = array[..., -1:] if has_alpha else np.full_like(array[..., :1], 65535)
    if channels == 4:
        colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
    elif colours.shape[-1] == 3:
        colours = (colours @ LUMA)[..., None].round().astype(np.uint16)
    return _scaled(np.concatenate([colours, alpha], axis=-1), value_range)


def _over_white(array: np.ndarray, channels: int, value_range: Range | None) -> Picture:
    """Scale colours (H, W, C); a second or fourth channel is alpha, and laid on white unless it is wanted."""
    picture = _scaled(array, value_range)
    if array.shape[-1] not in _WITH_ALPHA or channels in _WITH_ALPHA:
        return picture
    values = picture.array()
    alpha = values[..., -1:] / 255
    return _as_picture(values[..., :-1] * alpha + 255 * (1 - alpha))


def _scaled(array: np.ndarray, value_range: Range | None) -> Picture:
    """Bring the values of an array (H, W) or (H, W, C) to 0..255. ValueError if their range is not known."""
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "buif":
        raise ValueError(f"{array.dtype} of shape {list(array.shape)} is no picture (H, W) or (H, W, C)")
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    if value_range is None:
        low, high = (0, 1) if array.dtype.kind in "bf" else _FULL.get(array.dtype, (0, 0))
        if low == high or values.min() < low or values.max() > high:
            raise ValueError(
                f"{array.dtype} values in {values.min():g}..{values.max():g} have no known range; set value_range"
            )
        value_range = low, high
    low, high = value_range
    return _as_picture(np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.float32))


def _as_picture(values: np.ndarray) -> Picture:
    values = values[..., None] if values.ndim == 2 else values  # (H, W, C)
    return Image.fromarray(np.ascontiguousarray(values[..., 0])) if values.shape[-1] == 1 else Planes.of(values)
