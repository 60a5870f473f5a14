"""Pictures, masks and maps from files, for the scripts that are given some.

Pictures are bytes (C, H, W) here, so that what is not to change is kept exactly; `from_bytes` makes them floats.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.core.decoding import UNREADABLE, Planes, Range, open_image
from ldm.data.core.pixels import to_bytes
from ldm.data.core.transforms import ImageTransform, View
from ldm.data.image_pairs import partners
from ldm.data.image_pairs.partners import seen_indices
from ldm.data.readers.folders import EXTENSIONS, find_files
from ldm.errors import UserError

_log = logging.getLogger(__name__)
_MASK = "_mask"
PICTURES = (*EXTENSIONS, ".npy")
Size = tuple[int | None, int | None]
Value = TypeVar("Value")


class Source(NamedTuple):
    """Name a picture: its file, its path without ending below the folder that was given, and its mask's file."""

    path: Path
    name: str
    mask: Path | None = None


def list_pictures(place: str, flag: str, extensions: Sequence[str] = PICTURES) -> list[Source]:
    """List the pictures below a folder, or the one file. UserError if there are none."""
    path = Path(place).expanduser()
    if path.is_file():
        return [Source(path, path.stem)]
    if not path.is_dir():
        raise UserError(f"{flag} {place}: no such file or folder")
    found = [Source(path / file, str(Path(file).with_suffix(""))) for file in find_files(path, extensions)]
    if not found:
        raise UserError(f"{flag} {place}: holds no pictures ({', '.join(extensions)})")
    return found


def list_masked(indir: str) -> list[Source]:
    """List pairs NAME.png, NAME_mask.png below a folder; other endings will do. One without its partner is skipped.

    UserError if no pair is left.
    """
    files = {source.name: source.path for source in list_pictures(indir, "--indir")}
    pictures = {name: path for name, path in files.items() if not name.endswith(_MASK)}
    pairs = [Source(path, name, files[name + _MASK]) for name, path in pictures.items() if name + _MASK in files]
    partners = {source.name for source in pairs} | {source.name + _MASK for source in pairs}
    alone = [str(path) for name, path in files.items() if name not in partners]
    if not pairs:
        raise UserError(f"--indir {indir}: no pair NAME.png, NAME{_MASK}.png in it (alone: {_some(alone)})")
    if alone:
        _log.warning("skipped %d files without their partner NAME%s: %s", len(alone), _MASK, _some(alone))
    return pairs


def readable(sources: Sequence[Source], read: Callable[[Source], Value]) -> Iterator[tuple[Source, Value]]:
    """Read one file after the other; those that cannot be read are skipped, counted and named at the end.

    UserError if none can be read. Other mistakes, such as a mask of another size, pass through.
    """
    bad: list[str] = []
    for source in sources:
        try:
            value = read(source)
        except UNREADABLE as error:
            bad.append(f"{source.path} ({error})")
        else:
            yield source, value
    if len(bad) == len(sources):
        raise UserError(f"none of {len(bad)} pictures can be read: {_some(bad)}")
    if bad:
        _log.warning("skipped %d unreadable pictures: %s", len(bad), _some(bad))


def read_picture(path: Path, channels: int, size: Size = (None, None), value_range: Range | None = None) -> Tensor:
    """Read a picture as bytes (channels, H, W), scaled to `size` where it says something; as data sets read it.

    value_range: the values of black and white in arrays and files of more than 8 bits, see `open_image`. UserError
    where channels would be lost or invented; raises one of UNREADABLE.
    """
    image = open_image(path, channels, value_range)
    target = (size[0] or image.height, size[1] or image.width)
    transform = ImageTransform(target, crop="none", channels=channels)
    try:
        return to_bytes(transform.show(image, View(target[1], target[0])))  # (C, H, W)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def what_is_lost(path: Path, channels: int, value_range: Range | None = None) -> str | None:
    """Say what `read_picture` cannot keep of a picture, None if it keeps all; raises one of UNREADABLE."""
    image = open_image(path, channels, value_range)
    values = image.array() if isinstance(image, Planes) else np.asarray(image)
    if (values != values.round()).any():
        return "has more than 8 bits, and is rounded to 8"
    if channels in (1, 3):
        whole = open_image(path, 4, value_range)
        if whole.mode == "RGBA" and np.asarray(whole)[..., 3].min() < 255:
            return "is transparent, and is laid on white"
    return None


def read_mask(path: Path, size: tuple[int, int], target: Size = (None, None)) -> Tensor:
    """Read a mask of a picture of `size` as bool (1, H, W), True = hole, see `_mask_values`.

    Scaled to `target` where it says something. UserError for a mask of another size, and for one without a hole;
    raises one of UNREADABLE.
    """
    with Image.open(path) as opened:
        lossless = opened.format not in ("JPEG", "MPO")
        image = ImageOps.exif_transpose(opened)
    if (image.height, image.width) != tuple(size):
        raise UserError(
            f"{path}: the mask is {image.width}x{image.height}, its picture {size[1]}x{size[0]}; make them equal"
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
    """Return the values of a mask (H, W), and the one above which they are hole.

    That is the middle of their range: 0..1, 0..255 or 0..65535, whichever holds them; or any palette's index 0.
    """
    if image.mode in ("P", "PA"):
        return np.asarray(image.getchannel("P")), 0
    is_deep = image.mode.startswith("I") or image.mode == "F"
    values = np.asarray(image if is_deep else image.convert("L"))
    ranges = (1, 255, 65535) if lossless else (255,)  # JPEG leaves traces of 1 where nothing is white
    return values, next((high for high in ranges if values.max() <= high), values.max()) / 2


def read_indices(path: Path, size: Size = (None, None)) -> Tensor:
    """Read a map of class indices, int64 (H, W), as data sets read it, by nearest neighbours where `size` says one.

    UserError for colours and lossy files; raises one of UNREADABLE.
    """
    indices = partners.read_indices(path)
    height, width = size[0] or indices.shape[0], size[1] or indices.shape[1]
    seen = seen_indices(indices, View(width, height), height, width)
    return torch.from_numpy(np.ascontiguousarray(seen))  # (H, W)


def read_json(path: Path, flag: str) -> Any:
    """Read a JSON file. UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error})") from error


def _scaled(image: Image.Image, size: Size) -> Image.Image:
    height, width = size[0] or image.height, size[1] or image.width
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.NEAREST)


def padded(image: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (..., H, W) until `multiple` divides the sides."""
    for axis in (-2, -1):
        side = image.shape[axis]
        index = torch.arange(-(-side // multiple) * multiple, device=image.device).clamp(max=side - 1)
        image = image.index_select(axis, index)
    return image


def cropped(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut (..., H, W) to the size at the upper left."""
    return image[..., : size[0], : size[1]]


def read_prompts(file: str) -> list[str]:
    """Read the lines of a text file that are not empty. UserError if there are none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from-file {file}: cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--from-file {file}: holds no prompt")
    return prompts


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
