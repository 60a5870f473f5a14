"""Folders of images without captions, and the search for files that all readers of folders share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bounds import Count
from ldm.data.core.base import ImageDataset
from ldm.errors import UserError

__all__ = ["EXTENSIONS", "ImageFolder", "existing_folder", "find_files", "find_images", "find_tables", "read_list"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def existing_folder(root: str | Path) -> Path:
    """Return the folder as a path. Raises UserError if there is none."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{root}: {what}; set root to the folder of the images")
    return folder


def find_files(root: Path, extensions: Sequence[str] = EXTENSIONS) -> Iterator[str]:
    """List the files below a folder as sorted relative paths with forward slashes, without hidden ones."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix.lower() in extensions and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def find_images(root: Path) -> list[str]:
    """List the images below a folder as `find_files` does; if there are none, the arrays (.npy)."""
    return list(find_files(root)) or list(find_files(root, [".npy"]))


def find_tables(given: str, pattern: str, what: str, remedy: str) -> list[str]:
    """List the files that a path, a glob or a folder means; of a folder those of a glob `pattern`.

    Raises UserError, with `what` is absent and a `remedy`, if there are none.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return [str(path)]
    found = sorted(glob(str(path))) if has_magic(str(path)) else sorted(map(str, path.glob(pattern)))
    if not found:
        problem = f"a folder without {pattern.rpartition('/')[2]} files" if path.is_dir() else f"no such {what}"
        raise UserError(f"{given}: {problem}; {remedy}")
    return found


def read_list(path: Path) -> list[str]:
    """Read a text file of paths, one a line. Raises UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); set list_file to a text file of paths") from error
    return [Path(line.strip()).as_posix() for line in lines if line.strip()]


class ImageFolder(ImageDataset):
    """Read all images below `root`, sorted by path. Raises UserError for missing or empty folders.

    list_file: a text file that names the images to read, one path below `root` a line. class_folders: add
    `class_label`, the rank of the first folder below `root` that holds the image; `class_names` lists them. For the
    other options see `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Count | Sequence[Count],
        list_file: str | Path | None = None,
        class_folders: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.root = existing_folder(root)
        names = find_images(self.root) if list_file is None else read_list(Path(list_file).expanduser())
        if class_folders and any("/" not in name for name in names):
            raise UserError(f"{root}: class_folders needs every image in a folder of its class")
        self.class_names = sorted({name.split("/")[0] for name in names}) if class_folders else []
        self._index(names, str(root))

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        if not self.class_names:
            return {}
        return {"class_label": bisect_left(self.class_names, self.names[file].split("/")[0])}
