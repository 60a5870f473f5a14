"""Samples to a folder: numbered pictures, a grid, and a record from which they can be drawn again.

    samples/00000.png ...    counting on from what is there; pictures made from a file have its name instead
    grid-0000.png            one row of pictures after the other
    grid-0000.json           files with seed and condition, model, sampler, versions, command
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.environment import environment
from ldm.errors import UserError
from ldm.models.generate import to_uint8

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_GRID_PIXELS = 2**26
GRID_LIMIT = 400  # pictures in a grid


class PictureFolder:
    """Write pictures into `folder`; nothing that is already there is overwritten.

    columns: of the grid, which shows the first `grid_limit` pictures, and no more than fit into 64 million pixels.
    """

    def __init__(self, folder: str | Path, columns: int = 4, grid_limit: int = GRID_LIMIT) -> None:
        self.folder = Path(folder)
        self.columns = columns
        self.grid_limit = grid_limit
        self.entries: list[dict[str, Any]] = []
        self._grid: list[Tensor] = []
        self._next_sample: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._next_grid = _next_number(self.folder, r"grid-(\d+)\.(?:png|json)")
        except OSError as error:
            raise UserError(f"--outdir {folder}: cannot be made ({error.strerror})") from error

    def add(self, images: Tensor, details: list[Mapping[str, Any]]) -> None:
        """Write images (B, C, H, W) in [-1, 1], and note the details of each."""
        for image, detail in zip(to_uint8(images), details, strict=True):
            self.add_one(image, detail)

    def add_one(
        self, image: Tensor, detail: Mapping[str, Any], name: str | None = None, beside: Tensor | None = None
    ) -> None:
        """Write one picture of bytes (C, H, W), under `name` if it has one; without a PNG mode as an array (H, W, C).

        beside: bytes (C', H', W') to show left of it in the grid.
        """
        suffix = ".png" if len(image) in _MODES else ".npy"
        file = self._numbered(suffix) if name is None else self._free(name, suffix)
        if suffix == ".png":
            to_picture(image).save(self.folder / file)
        else:
            np.save(self.folder / file, rearrange(image, "c h w -> h w c").numpy())
        self.entries.append({"file": file, **detail})
        shown = [_visible(picture) for picture in (beside, image) if picture is not None]
        cell = side_by_side(shown)
        if len(self._grid) < self.grid_limit and cell[0].numel() * (len(self._grid) + 1) < _GRID_PIXELS:
            self._grid.append(cell)

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write the grid and the record of all pictures. Returns the path of the record."""
        stem = self.folder / f"grid-{self._next_grid:04}"
        if self._grid:
            to_picture(grid(_of_one_size(self._grid), self.columns)).save(stem.with_suffix(".png"))
        content = {**record, **environment(), "samples": self.entries}
        stem.with_suffix(".json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return stem.with_suffix(".json")

    def _numbered(self, suffix: str) -> str:
        if self._next_sample is None:
            (self.folder / "samples").mkdir(exist_ok=True)
            self._next_sample = _next_number(self.folder / "samples", r"(\d+)\.(?:png|npy)")
        self._next_sample += 1
        return f"samples/{self._next_sample - 1:05}{suffix}"

    def _free(self, name: str, suffix: str) -> str:
        file, number = f"{name}{suffix}", 0
        while (self.folder / file).exists():
            number += 1
            file = f"{name}-{number}{suffix}"
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        return file


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Put pictures of bytes (C, H, W) into one row: (C', max H, sum of W).

    Greys become colours beside colours, and these opaque beside transparent ones.
    """
    height, channels = max(image.shape[1] for image in images), max(len(image) for image in images)
    return torch.cat([_laid_out(image, channels, height, image.shape[2]) for image in images], dim=2)


def _visible(image: Tensor) -> Tensor:
    """Show channels for which there is no colour one beside the other, as greys."""
    return image if len(image) in _MODES else rearrange(image, "c h w -> 1 h (c w)")


def _of_one_size(images: Sequence[Tensor]) -> Tensor:
    """Fill pictures (C, H, W) up to the largest sides: (N, C, H, W)."""
    channels, height, width = (max(sides) for sides in zip(*(image.shape for image in images), strict=True))
    return torch.stack([_laid_out(image, channels, height, width) for image in images])


def _laid_out(image: Tensor, channels: int, height: int, width: int) -> Tensor:
    image = image.expand(min(channels, 3), -1, -1) if len(image) == 1 else image
    if len(image) < channels:
        image = torch.cat([image, torch.full_like(image[:1], 255)])
    return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))


def to_picture(image: Tensor) -> Image.Image:
    """Make a picture of bytes (C, H, W). UserError unless C is 1, 3 or 4."""
    if len(image) not in _MODES:
        raise UserError(f"a picture of {len(image)} channels has no PNG; those of {list(_MODES)} channels have")
    return Image.fromarray(rearrange(image, "c h w -> h w c").squeeze(-1).numpy(), _MODES[len(image)])


def grid(images: Tensor, columns: int) -> Tensor:
    """Lay out images (N, C, H, W) in rows of `columns`, without borders; missing ones are 0: (C, rows H, cols W)."""
    columns = min(columns, len(images))
    missing = math.ceil(len(images) / columns) * columns - len(images)
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    return rearrange(images, "(row column) c h w -> c (row h) (column w)", column=columns)


def _next_number(folder: Path, pattern: str) -> int:
    matches = (re.fullmatch(pattern, file.name) for file in folder.iterdir())
    return max((int(match.group(1)) + 1 for match in matches if match), default=0)
