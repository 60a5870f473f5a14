"""Files that belong to pictures: finding them in another folder, and cutting out of them what a view shows.

Legend: f factor by which a twin is smaller than its picture; a view (see `transforms.View`) says which part is shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ldm.data.core.decoding import Picture, Planes
from ldm.data.core.transforms import UNREADABLE, View
from ldm.data.readers.folders import find_pictures
from ldm.errors import UserError

__all__ = [
    "find_pairs",
    "insist_on_same_shape",
    "naming",
    "read_indices",
    "seen_indices",
    "seen_picture",
    "snapped",
]

_log = logging.getLogger(__name__)
_LOSSY = ("JPEG", "MPO")
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


def find_pairs(root: Path, target_root: str | Path, suffix: str = "") -> dict[str, Path]:
    """Return the partner of each picture below `root` that has one: the same path below `target_root`, any extension.

    Keys are relative paths. suffix: what the partner's stem has in addition (`a.jpg` and `a_mask.png`); the two folders
    may then be one. Pictures without a partner and partners without a picture are named in one warning each. Raises
    UserError if no picture has a partner, or one has several, and for one folder without a suffix.
    """
    names = _without_partners(find_pictures(root), suffix)
    folder = Path(target_root).expanduser()
    if not folder.is_dir():
        raise UserError(f"{target_root}: no such folder; set it to the folder of the partners")
    if not suffix and folder.samefile(root):
        raise UserError(f"{target_root}: is the folder of the pictures too, each would be its own partner; set suffix")
    found: dict[str, str] = {}
    for file in find_pictures(folder):
        stem = _stem(file)
        if not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in found:
            raise UserError(f"{folder}: {found[stem]} and {file} are partners of one picture; remove one")
        found[stem] = file
    partners = {name: folder / found[_stem(name)] for name in names if _stem(name) in found}
    alone = [name for name in names if name not in partners]
    if names and not partners:
        raise UserError(
            f"{folder}: none of {len(names)} pictures has a partner here, the first would be "
            f"{_stem(names[0])}{suffix}.png; set target_root to a folder with the same names"
        )
    _warn(alone, f"of {len(names)} pictures have no partner in {folder} and are left out")
    wanted = {_stem(name) for name in names}
    _warn([file for stem, file in found.items() if stem not in wanted], f"files in {folder} have no picture")
    return partners


def _warn(names: list[str], what: str) -> None:
    if names:
        _log.warning("%d %s, the first is %s", len(names), what, names[0])


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def insist_on_same_shape(image: Picture, width: int, height: int, f: int = 1) -> None:
    """Raise ValueError unless width x height is 1/f of the picture; for f = 1 its shape in any size will do."""
    if f == 1:
        fits = abs(width * image.height - height * image.width) <= max(image.width, image.height)
    else:
        fits = max(abs(width - image.width / f), abs(height - image.height / f)) < 1
    if not fits:
        wanted = "another shape than" if f == 1 else f"not 1/{f} of"
        raise ValueError(f"its partner is {height}x{width}, {wanted} the picture's {image.height}x{image.width}")


def read_indices(path: Path) -> np.ndarray:
    """Read an index picture: int64 (H, W). UserError for colours and for lossy files, whose indices are wrong."""
    if path.suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            kind = f"{array.dtype} {array.shape}"
            raise UserError(f"{path}: no map of class indices, it holds {kind}; save integers (H, W)")
        return array.astype(np.int64)
    with Image.open(path) as opened:
        opened.load()
        if opened.mode not in _INDEX_MODES or opened.format in _LOSSY:
            kind = "JPEG changes indices" if opened.format in _LOSSY else f"it has the mode {opened.mode}"
            raise UserError(f"{path}: no map of class indices, {kind}; save indices as PNG of one channel, 8 or 16 bit")
        return np.asarray(opened).astype(np.int64)


def seen_indices(indices: np.ndarray, view: View, height: int, width: int) -> np.ndarray:
    """Show a view of an index map, by nearest neighbours: (H, W) of any scale -> (height, width)."""
    rows = (view.top + np.arange(height) + 0.5) * indices.shape[0] / view.height
    columns = (view.left + np.arange(width) + 0.5) * indices.shape[1] / view.width
    seen = indices[rows.astype(int)[:, None], columns.astype(int)[None, :]]
    return seen[:, ::-1] if view.mirrored else seen


def snapped(view: View, f: int) -> View:
    """Move a crop to the upper left by less than f pixels, so that it covers whole pixels of a twin smaller by f."""
    return view._replace(left=view.left - view.left % f, top=view.top - view.top % f)


def seen_picture(
    target: Picture, image: Picture, view: View, size: tuple[int, int], f: int, resampling: Image.Resampling
) -> Picture:
    """Cut (not mirror) out of a picture's partner what a view shows of the picture, as `size` (width, height).

    The picture's pixel is 1/f of the partner's pixel; for f = 1 the two may differ in scale. What is seen at its own
    resolution is copied, not interpolated.
    """
    if isinstance(target, Planes):
        return Planes(tuple(seen_picture(plane, image, view, size, f, resampling) for plane in target.planes))
    whole = target.size if f == 1 else (image.width / f, image.height / f)
    across, down = whole[0] / view.width, whole[1] / view.height  # partner's pixels per pixel of the view
    left, top = view.left * across, view.top * down
    right, bottom = left + size[0] * f * across, top + size[1] * f * down
    box = (left, top, min(right, target.width), min(bottom, target.height))
    rounded = tuple(round(side) for side in box)
    if (rounded[2] - rounded[0], rounded[3] - rounded[1]) == size and max(
        abs(a - b) for a, b in zip(box, rounded, strict=True)
    ) < 1e-3:
        return target.crop(rounded)
    return target.resize(size, resampling, box=box)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path before what is said of a file that cannot be read; raises ValueError, which is one of UNREADABLE."""
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(f"{path}: {error}") from error


def _without_partners(names: Iterable[str], suffix: str) -> list[str]:
    """Leave out the files that are partners of others in the same folder, by a suffix that is not empty."""
    return [name for name in names if not (suffix and _stem(name).endswith(suffix))]
