"""Files that belong to images, the targets: finding them in another folder, and cropping them like their images.

Legend: f factor by which a target is smaller than its image; crop, see `transforms.CropParams`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from ldm.data.core.decoding import DecodedImage, MultichannelImage, damage_is_unreadable, stream_of
from ldm.data.core.files import find_images, regular_file
from ldm.data.core.transforms import UNREADABLE, CropParams
from ldm.errors import UserError

__all__ = [
    "align_crop",
    "check_same_shape",
    "crop_index_map",
    "crop_target",
    "find_pairs",
    "name_file_in_errors",
    "read_hole",
    "read_indices",
]

LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")  # formats that change values, or may
_log = logging.getLogger(__name__)
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def find_pairs(root: Path, target_root: str | Path, suffix: str = "", arrays: bool = False) -> dict[str, Path]:
    """Return the target of each image below `root` that has one: the same path below `target_root`, any extension.

    Keys are relative paths. suffix: what the stem of a target has in addition (`a.jpg` and `a_mask.png`); both folders
    may then be one. arrays: see `find_images`. Images without a target, and targets without an image, are logged.
    Raises UserError if no image has a target, if one has several, and for one folder without a suffix.
    """
    names = [name for name in find_images(root, arrays) if not (suffix and _stem(name).endswith(suffix))]
    folder = Path(target_root).expanduser()
    if not folder.is_dir():
        raise UserError(f"{target_root}: no such folder; set it to the folder of the targets")
    if not suffix and folder.samefile(root):
        raise UserError(f"{target_root}: is the folder of the images too, each would be its own target; set suffix")
    found: dict[str, str] = {}
    for file in find_images(folder, arrays):
        stem = _stem(file)
        if not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in found:
            raise UserError(f"{folder}: {found[stem]} and {file} are targets of one image; remove one")
        found[stem] = file
    targets = {name: folder / found[_stem(name)] for name in names if _stem(name) in found}
    alone = [name for name in names if name not in targets]
    if names and not targets:
        raise UserError(
            f"{folder}: none of {len(names)} images has a target, the first would be {_stem(names[0])}{suffix}.png; "
            "give them the names of their images"
        )
    _warn(alone, f"of {len(names)} images have no target in {folder} and are left out")
    wanted = {_stem(name) for name in names}
    _warn([file for stem, file in found.items() if stem not in wanted], f"files in {folder} have no image")
    return targets


def _warn(names: list[str], what: str) -> None:
    if names:
        _log.warning("%d %s, the first is %s", len(names), what, names[0])


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def check_same_shape(image: DecodedImage, width: int, height: int, f: int = 1) -> None:
    """Raise ValueError unless width x height is 1/f of the image; for f = 1 only the aspect ratio must be equal."""
    if f == 1:
        fits = abs(width * image.height - height * image.width) <= max(image.width, image.height)
    else:
        fits = max(abs(width - image.width / f), abs(height - image.height / f)) < 1
    if not fits:
        wanted = "another shape than" if f == 1 else f"not 1/{f} of"
        raise ValueError(f"the target is {height}x{width}, {wanted} the image's {image.height}x{image.width}")


@damage_is_unreadable()
def read_indices(path: Path | bytes) -> np.ndarray:
    """Read a map of class indices: int64 (H, W). UserError for colours and for lossy files, whose indices are wrong."""
    if isinstance(path, Path) and path.suffix.lower() == ".npy":
        array = np.load(regular_file(path), allow_pickle=False)
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
            kind = f"{array.dtype} {array.shape}"
            raise UserError(f"{path}: no map of class indices, it holds {kind}; save integers (H, W)")
        return array.astype(np.int64)
    with Image.open(stream_of(path)) as opened:
        opened.load()
        if opened.mode not in _INDEX_MODES or opened.format in LOSSY:
            kind = "JPEG changes indices" if opened.format in LOSSY else f"it has the mode {opened.mode}"
            raise UserError(f"{path}: no map of class indices, {kind}; save indices as PNG of one channel, 8 or 16 bit")
        return np.asarray(ImageOps.exif_transpose(opened)).astype(np.int64)


@damage_is_unreadable()
def read_hole(path: Path | bytes) -> tuple[np.ndarray, str | None]:
    """Read a mask: bool (H, W), True in the hole, and the problem of one that is hole everywhere or nowhere, or None.

    The hole is what lies above the middle of the smallest range that holds all values: 0..1 (not in lossy formats),
    0..255 or 0..65535. A colour counts as its brightest channel; in palettes of colours of which index 0 is black,
    every other index is hole. Where all pixels have one colour, what is transparent is hole. An EXIF orientation is
    applied.
    """
    with Image.open(stream_of(path)) as opened:
        is_exact = opened.format not in LOSSY
        image = ImageOps.exif_transpose(opened)
    values, is_alpha = _mask_values(image)
    if is_alpha:
        _warn_once("masks of one colour are read by their alpha: what is transparent is hole")
    ranges = (1, 255, 65535) if is_exact else (255,)  # a 1 may be left of something else where values are not exact
    middle = next((high for high in ranges if values.max() <= high), values.max()) / 2
    hole = (values > middle) != is_alpha
    if hole.any() and not hole.all():
        return hole, None
    return hole, (
        f"a mask {'that is all' if hole.any() else 'without a'} hole, its values are {values.min():g} to "
        f"{values.max():g}; a hole is what is white (128 and more of 255), 1 in masks of 0 and 1, or transparent in "
        "masks of one colour"
    )


@cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def _mask_values(image: Image.Image) -> tuple[np.ndarray, bool]:
    """Return what a mask says in each pixel, (H, W), and whether that is its alpha, whose low values are the hole."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image), False
    pixels = np.asarray(image.convert("RGBA"))  # (H, W, 4)
    colours, alpha = pixels[..., :3], pixels[..., 3]
    if (colours == colours[0, 0]).all() and (alpha != alpha[0, 0]).any():
        return alpha, True
    is_grey = (colours == colours[..., :1]).all()
    if image.mode in ("P", "PA") and not is_grey and not any(image.getpalette()[:3]):
        return (np.asarray(image.getchannel("P")) > 0) * np.uint8(255), False
    return colours.max(axis=2), False


def crop_index_map(indices: np.ndarray, crop: CropParams, height: int, width: int) -> np.ndarray:
    """Crop (and flip) an index map of any scale by nearest neighbours: (H, W) -> (height, width)."""
    rows = (crop.top + np.arange(height) + 0.5) * indices.shape[0] / crop.height
    columns = (crop.left + np.arange(width) + 0.5) * indices.shape[1] / crop.width
    cropped = indices[rows.astype(int)[:, None], columns.astype(int)[None, :]]
    return cropped[:, ::-1] if crop.flip else cropped


def align_crop(crop: CropParams, f: int) -> CropParams:
    """Move a crop to the upper left by less than f pixels, so that it covers whole pixels of a target smaller by f."""
    return crop._replace(left=crop.left - crop.left % f, top=crop.top - crop.top % f)


def crop_target(
    target: DecodedImage,
    image: DecodedImage,
    crop: CropParams,
    size: tuple[int, int],
    f: int,
    resampling: Image.Resampling,
) -> DecodedImage:
    """Crop a target to the region that `crop` selects in its image, resized to `size` (width, height). Does not flip.

    For f = 1 the two may differ in scale. A region that needs no resizing is copied without interpolation.
    """
    if isinstance(target, MultichannelImage):
        return MultichannelImage(tuple(crop_target(plane, image, crop, size, f, resampling) for plane in target.planes))
    whole = target.size if f == 1 else (image.width / f, image.height / f)
    across, down = whole[0] / crop.width, whole[1] / crop.height  # target's pixels per pixel of the resized image
    left, top = crop.left * across, crop.top * down
    right, bottom = left + size[0] * f * across, top + size[1] * f * down
    box = (left, top, min(right, target.width), min(bottom, target.height))
    rounded = tuple(round(side) for side in box)
    if (rounded[2] - rounded[0], rounded[3] - rounded[1]) == size and max(
        abs(a - b) for a, b in zip(box, rounded, strict=True)
    ) < 1e-3:
        return target.crop(rounded)
    return target.resize(size, resampling, box=box)


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Put the path before the message of UNREADABLE errors; raises ValueError, which is one of them."""
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(f"{path}: {error}") from error
