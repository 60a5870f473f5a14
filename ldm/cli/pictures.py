"""Samples to a folder: numbered pictures, a grid, and a record from which they can be drawn again.

    samples/00000.png ...    counting on from what is there
    grid-0000.png            one row of pictures after the other
    grid-0000.json           files with seed and condition, model, sampler, versions, command
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.generate import to_uint8

_PACKAGES = ("latent-diffusion", "torch", "pytorch-lightning", "numpy", "transformers", "tokenizers")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class PictureFolder:
    """Write pictures into `folder`; nothing that is already there is overwritten.

    columns: of the grid, which shows the first `grid_limit` pictures.
    """

    def __init__(self, folder: str | Path, columns: int = 4, grid_limit: int = 400) -> None:
        self.folder = Path(folder)
        self.columns = columns
        self.grid_limit = grid_limit
        self.entries: list[dict[str, Any]] = []
        self._grid: list[Tensor] = []
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--outdir {folder}: cannot be made ({error.strerror})") from error
        self._next_sample = _next_number(self.folder / "samples", r"(\d+)\.png")
        self._next_grid = _next_number(self.folder, r"grid-(\d+)\.(?:png|json)")

    def add(self, images: Tensor, details: list[Mapping[str, Any]]) -> None:
        """Write images (B, C, H, W) in [-1, 1], and note the details of each. UserError unless C is 1, 3 or 4."""
        for image, detail in zip(to_uint8(images), details, strict=True):
            file = f"samples/{self._next_sample:05}.png"
            to_picture(image).save(self.folder / file)
            self._next_sample += 1
            self.entries.append({"file": file, **detail})
            if len(self._grid) < self.grid_limit:
                self._grid.append(image)

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write the grid and the record of all pictures. Returns the path of the record."""
        stem = self.folder / f"grid-{self._next_grid:04}"
        to_picture(grid(torch.stack(self._grid), self.columns)).save(stem.with_suffix(".png"))
        content = {**record, **environment(), "samples": self.entries}
        stem.with_suffix(".json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return stem.with_suffix(".json")


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


def environment() -> dict[str, Any]:
    """Tell when, with which command and which versions this runs."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"time": datetime.now().isoformat(timespec="seconds"), "command": shlex.join(sys.argv), "versions": versions}


def _next_number(folder: Path, pattern: str) -> int:
    matches = (re.fullmatch(pattern, file.name) for file in folder.iterdir())
    return max((int(match.group(1)) + 1 for match in matches if match), default=0)
