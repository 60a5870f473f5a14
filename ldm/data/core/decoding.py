"""Decode image files: 8 bits by Pillow, 16-bit PNG by OpenCV, other TIFF by tifffile, arrays (.npy) by NumPy.

A decoded image is a PIL image, or a `MultichannelImage` where PIL has no mode for it. Its values are 0..255, as floats
where the file has more than 8 bits. An EXIF orientation is applied.
"""

from __future__ import annotations

import io
import struct
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ldm.data.core.files import regular_file
from ldm.data.core.optional import require
from ldm.errors import UserError

__all__ = [
    "LUMA", "UNREADABLE", "DecodedImage", "MultichannelImage", "Range", "check_range",
    "damage_is_unreadable", "image_size", "open_image", "stream_of",
]  # fmt: skip

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
Range = tuple[float, float]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as PIL uses for 8 bits
_NUMPY, _TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FULL = {np.dtype(np.uint8): (0, 255), np.dtype(np.uint16): (0, 65535)}
_WITH_ALPHA = (2, 4)  # numbers of channels of which the last is alpha
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _ORIENTATION = 258, 262, 277, 338, 274  # tags of TIFF and EXIF
_GREY, _RGB = (0, 1), 2  # photometric interpretations of TIFF
_ALPHA = (1, 2, 999)  # extra samples of TIFF: associated alpha, unassociated alpha, and the value that Corel writes
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = (5, 6, 7, 8)
# What readers raise for damaged files; MemoryError where a header declares too large a size.
_DAMAGE = (struct.error, zlib.error, tokenize.TokenError, LookupError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class MultichannelImage:
    """An image of any number of channels, each a PIL image of mode F with values 0..255; used like a PIL image."""

    planes: tuple[Image.Image, ...]
    mode = "planes"

    @classmethod
    def of(cls, array: np.ndarray) -> MultichannelImage:
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

    def getbands(self) -> tuple[str, ...]:
        """Return the numbers of the channels as their names."""
        return tuple(map(str, range(len(self.planes))))

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, ...] | None = None
    ) -> MultichannelImage:
        """Resize every channel, of which `box` is the part to resize."""
        return MultichannelImage(tuple(plane.resize(size, resample, box) for plane in self.planes))

    def crop(self, box: tuple[int, int, int, int]) -> MultichannelImage:
        """Crop every channel."""
        return MultichannelImage(tuple(plane.crop(box) for plane in self.planes))

    def transpose(self, method: Image.Transpose) -> MultichannelImage:
        """Flip or rotate every channel."""
        return MultichannelImage(tuple(plane.transpose(method) for plane in self.planes))

    def array(self) -> np.ndarray:
        """Return the values, float32 (H, W, C)."""
        return np.stack([np.asarray(plane) for plane in self.planes], axis=-1)


DecodedImage = Image.Image | MultichannelImage


@contextmanager
def damage_is_unreadable() -> Iterator[None]:
    """Turn whatever decoders raise for a damaged file into OSError, one of UNREADABLE; a function's decorator, too."""
    try:
        yield
    except UnidentifiedImageError as error:  # whose text is about an object in memory
        raise OSError("is no image of a known format") from error
    except _DAMAGE as error:
        raise OSError(f"damaged ({type(error).__name__}: {error})") from error


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


@damage_is_unreadable()
def open_image(source: Path | bytes, channels: int = 3, value_range: Range | None = None) -> DecodedImage:
    """Decode an image to values 0..255: mode L, LA, RGB, RGBA or F, or a `MultichannelImage`.

    Raises one of UNREADABLE, or UserError if a package is missing.

    Args:
        source: a path, or the content of a file. Arrays (.npy, TIFF) are (H, W) or (H, W, C).
        channels: how many are wanted. 2 and 4 keep alpha; otherwise the image is laid on white. All numbers but 1 and
            3 read every page of a grey TIFF.
        value_range: the values of black and white in arrays and in files of more than 8 bits; by default 0 and 65535
            for 16 bits, 0 and 1 for floats.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(regular_file(source), "rb") as stream:
        start = stream.read(6)
        stream.seek(0)
        if start.startswith(_NUMPY):
            return _scaled(np.load(stream, allow_pickle=False), value_range)
        read = _read_tiff if start[:4] in _TIFF else _read_with_pillow
        return read(stream, channels, value_range)


def stream_of(source: Path | bytes) -> Path | BinaryIO:
    """Return what Pillow opens: a path, or the content of a file. Raises OSError for a path that is no file."""
    return io.BytesIO(source) if isinstance(source, bytes) else regular_file(source)


@damage_is_unreadable()
def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) as the image is seen, from the header where Pillow reads it. Raises as `open_image`."""
    try:
        with Image.open(regular_file(path)) as image:
            turned = image.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE
            return image.size[::-1] if turned else image.size
    except UnidentifiedImageError:
        return open_image(path).size


def _read_with_pillow(stream: BinaryIO, channels: int, value_range: Range | None) -> DecodedImage:
    with Image.open(stream) as opened:
        is_deep = opened.format == "PNG" and "transparency" not in opened.info and opened.mode in ("RGB", "RGBA")
        if is_deep and (layout := str(opened.tile[0].args)).endswith(";16B"):  # of which Pillow keeps 8 bits
            image = _read_deep_png(stream, layout, channels, value_range)
            return _turned(image, opened.getexif().get(_ORIENTATION, 1))
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I") or image.mode == "F":
        array = np.asarray(image)
        is_short = image.mode.startswith("I") and array.min() >= 0 and array.max() <= 65535
        if is_short:
            return _with_wanted_alpha(array.astype(np.uint16)[..., None], channels, value_range)
        return _scaled(array, value_range)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels in _WITH_ALPHA:
            return image
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")


def _read_deep_png(stream: BinaryIO, layout: str, channels: int, value_range: Range | None) -> DecodedImage:
    """Read 16-bit colours, or 16-bit grey with alpha, which OpenCV returns as BGR, and as BGRA of equal colours."""
    cv2 = require("cv2", "data: PNG with 16-bit colours", "opencv-python-headless")
    stream.seek(0)
    array = cv2.imdecode(np.frombuffer(stream.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise OSError("damaged PNG")
    order = [0, 3] if layout.startswith("LA") else [2, 1, 0, 3][: array.shape[-1]]
    return _with_wanted_alpha(array[..., order], channels, value_range)


def _turned(image: DecodedImage, orientation: int) -> DecodedImage:
    """Apply the orientation that is noted in a file to what another library than Pillow has read of it."""
    method = _TRANSPOSED.get(orientation)
    return image if method is None else image.transpose(method)


def _read_tiff(stream: BinaryIO, channels: int, value_range: Range | None) -> DecodedImage:
    """Read by Pillow, unless it would refuse the file, round it to 8 bits, or leave samples or pages out."""
    tags, num_pages = _tiff_pages(stream)
    samples, bits, colours = tags.get(_SAMPLES, 1), max(tags.get(_BITS, (1,))), tags.get(_PHOTOMETRIC)
    is_whole = samples <= 4 and (samples == 1 or bits <= 8) and (channels in (1, 3) or num_pages == 1)
    if samples in _WITH_ALPHA and colours in (*_GREY, _RGB):
        is_lost = samples == channels and not _ends_in_alpha(colours, tags.get(_EXTRA, ()))
        is_whole = is_whole and not is_lost and not (samples == 4 and colours in _GREY)
    stream.seek(0)
    if is_whole:
        return _read_with_pillow(stream, channels, value_range)
    return _turned(_read_by_tifffile(stream, channels, value_range), tags.get(_ORIENTATION, 1))


def _ends_in_alpha(photometric: int, extra: Sequence[int]) -> bool:
    """Return whether the last sample is alpha; with RGB an extra sample of no declared kind is, as in Pillow."""
    return extra[-1] in _ALPHA if extra else photometric == _RGB


def _tiff_pages(stream: BinaryIO) -> tuple[dict[int, Any], int]:
    """Return the tags of the first page, and the number of pages. Raises OSError if a page is not in the file.

    Checked here, since tifffile leaves out the pages beyond the end of a file that is cut off.
    """
    header = stream.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header + (stream.read(8) if header[2] == 43 else b""))
    first, offsets = {}, set()
    while tags.next and tags.next not in offsets:
        offset = tags.next
        offsets.add(offset)
        stream.seek(offset)
        tags.load(stream)
        if tags.next == offset:  # Pillow only warns
            raise OSError("damaged TIFF, a page of it is beyond the end of the file")
        first = first or dict(tags)
    return first, len(offsets)


def _read_by_tifffile(stream: BinaryIO, channels: int, value_range: Range | None) -> DecodedImage:
    """Read all samples and pages of a TIFF."""
    tifffile = require("tifffile", "data: TIFF of more than 4 channels, of several pages or with 16-bit colours")
    with tifffile.TiffFile(stream) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        array, axes = series.asarray(), series.axes
    if array.ndim > 3 or not {"Y", "X"} <= set(axes):
        raise ValueError(f"a TIFF with the axes {axes} is no image")
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (0, 1))
    if _ends_in_alpha(page.photometric, page.extrasamples):
        return _with_wanted_alpha(array, channels, value_range)
    is_colour = page.photometric == _RGB and channels in (1, 3)
    return _scaled(array[..., :3] if is_colour else array, value_range)


def _with_wanted_alpha(array: np.ndarray, channels: int, value_range: Range | None) -> DecodedImage:
    """Scale grey or colours (H, W, 1 to 4), and add alpha or lay it on white, for the number of channels."""
    image, has_alpha = _scaled(array, value_range), array.shape[-1] in _WITH_ALPHA
    if not has_alpha and channels not in _WITH_ALPHA:
        return image
    values = image.array() if isinstance(image, MultichannelImage) else np.asarray(image)[..., None]
    colours, alpha = (values[..., :-1], values[..., -1:]) if has_alpha else (values, np.full_like(values[..., :1], 255))
    if channels not in _WITH_ALPHA:
        return _as_image(colours * (alpha / 255) + 255 * (1 - alpha / 255))
    if channels == 4:
        colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
    elif colours.shape[-1] == 3:
        colours = (colours @ LUMA)[..., None]
    return _as_image(np.concatenate([colours, alpha], axis=-1))


def _scaled(array: np.ndarray, value_range: Range | None) -> DecodedImage:
    """Scale the values of an array (H, W) or (H, W, C) to 0..255. Raises ValueError if their range is not known."""
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "buif":
        raise ValueError(f"{array.dtype} of shape {list(array.shape)} is no image (H, W) or (H, W, C)")
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
    return _as_image(np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.float32))


def _as_image(values: np.ndarray) -> DecodedImage:
    values = values[..., None] if values.ndim == 2 else values  # (H, W, C)
    is_grey = values.shape[-1] == 1
    return Image.fromarray(np.ascontiguousarray(values[..., 0])) if is_grey else MultichannelImage.of(values)
