"""Folders of pictures without captions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bounds import Count
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import Picture
from ldm.errors import UserError

__all__ = ["EXTENSIONS", "ImageFolder", "existing_folder", "find_files", "find_pictures", "read_list"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


def existing_folder(root: str | Path) -> Path:
    """Return the folder as a path. Raises UserError if there is none."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{root}: {what}; set root to the folder of the pictures")
    return folder


def find_files(root: Path, extensions: Sequence[str] = EXTENSIONS) -> Iterator[str]:
    """List files below a folder as sorted relative paths with forward slashes, without what is hidden."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix.lower() in extensions and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def find_pictures(root: Path) -> list[str]:
    """List the pictures below a folder as `find_files` does; if there are none, the arrays (.npy)."""
    return list(find_files(root)) or list(find_files(root, [".npy"]))


def read_list(path: Path) -> list[str]:
    """Read a text of paths, one a line. Raises UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); set list_file to a text file of paths") from error
    return [Path(line.strip()).as_posix() for line in lines if line.strip()]


class ImageFolder(ImageDataset):
    """Read all pictures below `root`, sorted by path, or those that `list_file` names, one relative path a line.

    `class_folders` adds `class_label`, the rank of the first folder below `root` that holds the picture, `class_names`
    lists them. For the other options see `ImageDataset`. Raises UserError for missing or empty folders.
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
        names = find_pictures(self.root) if list_file is None else read_list(Path(list_file).expanduser())
        if class_folders and any("/" not in name for name in names):
            raise UserError(f"{root}: class_folders needs every picture in a folder of its class")
        self.class_names = sorted({name.split("/")[0] for name in names}) if class_folders else []
        self._index(names, str(root))

    def _read_image(self, file: int) -> Picture:
        return self.transform.open(self.root / self.names[file])

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        if not self.class_names:
            return {}
        return {"class_label": bisect_left(self.class_names, self.names[file].split("/")[0])}
