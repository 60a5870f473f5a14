"""Folders of images without captions, with a folder a class or without."""

from __future__ import annotations

import logging
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np

from ldm.bounds import Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.files import existing_folder, find_images, is_litter, is_split, read_lines, written_path
from ldm.errors import UserError

__all__ = ["ImageFolder", "read_list"]

_log = logging.getLogger(__name__)


def read_list(path: Path) -> list[str]:
    """Read a text file of paths, one a line, without litter. Raises UserError if it cannot be read."""
    lines = read_lines(path, "set list_file to a text file of paths")
    names = [Path(written_path(line)).as_posix() for line in lines]
    kept = [name for name in names if not is_litter(name)]
    if len(kept) < len(names):
        _log.warning("%s: %d lines name no images of yours (._x, Thumbs.db ...)", path, len(names) - len(kept))
    return kept


class ImageFolder(ImageDataset):
    """Read all images below `root`, sorted by path. Raises UserError for missing or empty folders.

    list_file: a text file that names the images to read, one path below `root` a line. class_folders: add
    `class_label`, the rank of the first folder below `root` that holds the image; `class_names` lists them. For the
    other options see `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Sides,
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
        if self.class_names and all(map(is_split, self.class_names)):
            one = min(self.class_names, key=lambda name: not name.lower().startswith("train"))
            splits = ", ".join(self.class_names)
            raise UserError(f"{root}: {splits} are splits and not classes; name one of them, such as {root}/{one}")
        self._index(names, str(root))

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        if not self.class_names:
            return {}
        return {"class_label": bisect_left(self.class_names, self.names[file].split("/")[0])}
