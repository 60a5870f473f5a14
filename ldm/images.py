"""Images as bytes (C, H, W): grids, colours of classes, outlines of boxes, and a folder of samples with their record.

FOLDER/samples/00000.png ...  counting on from what is there; an image made from a file has that file's name instead
FOLDER/grid-0000.png          rows of images
FOLDER/grid-0000.json         for each file its seed and condition; model, sampler, versions, command
"""

from __future__ import annotations

import colorsys
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.data.core.pixels import to_bytes
from ldm.environment import environment
from ldm.errors import UserError, writable

Box = Sequence[float]  # left, top, width, height in [0, 1]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_GRID_PIXELS = 2**26
_log = logging.getLogger(__name__)
GRID_LIMIT = 400  # images in a grid
_GOLDEN = 0.618034  # turns of the colour wheel between neighbours, which then differ most
_PROJECTION_SEED = 0


def to_pil(image: Tensor) -> Image.Image:
    """Convert bytes (C, H, W) to a PIL image. UserError unless C is 1, 3 or 4."""
    if len(image) not in _MODES:
        raise UserError(f"an image of {len(image)} channels has no PNG; those of {list(_MODES)} channels have")
    return Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").squeeze(-1).numpy(), _MODES[len(image)])


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Return images (N, C, H, W) in rows of `columns`, without borders: (C, rows H, columns W); empty cells are 0."""
    columns = min(columns, len(images))
    missing = math.ceil(len(images) / columns) * columns - len(images)
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    return rearrange(images, "(row column) c h w -> c (row h) (column w)", column=columns)


def to_rgb_bytes(images: Tensor) -> Tensor:
    """Convert images (N, C, H, W) in [-1, 1] to bytes (N, 3, H, W); other than 1 or 3 channels are projected."""
    images = images.detach().float().cpu()
    if images.shape[1] not in (1, 3):
        generator = torch.Generator().manual_seed(_PROJECTION_SEED)
        images = F.conv2d(images, torch.randn(3, images.shape[1], 1, 1, generator=generator))
        low, high = images.amin(), images.amax()
        images = 2 * (images - low) / (high - low).clamp(min=1e-6) - 1
    return to_bytes(images.expand(-1, 3, -1, -1))


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Return bytes (C, H, W) in one row: (C', max H, sum of W), converted to the most channels of any of them."""
    height, channels = max(image.shape[1] for image in images), max(len(image) for image in images)
    return torch.cat([_padded(image, channels, height, image.shape[2]) for image in images], dim=2)


def _padded(image: Tensor, channels: int, height: int, width: int) -> Tensor:
    image = image.expand(min(channels, 3), -1, -1) if len(image) == 1 else image
    if len(image) < channels:
        image = torch.cat([image, torch.full_like(image[:1], 255)])  # opaque
    return F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))


def palette(num_classes: int) -> Tensor:
    """Return a colour for each class: bytes (K, 3), none of them black."""
    colours = [colorsys.hsv_to_rgb(index * _GOLDEN % 1, 0.65, 0.95) for index in range(num_classes)]
    return (torch.tensor(colours) * 255).to(torch.uint8)


def colour_classes(classes: Tensor, num_classes: int | None = None) -> Tensor:
    """Return a map of classes (H, W) in the colours of `palette`, negative ones in black: bytes (3, H, W)."""
    known = palette(int(classes.max()) + 1 if num_classes is None else num_classes)
    return (known[classes.clamp(min=0)] * (classes >= 0)[..., None]).movedim(-1, -3).contiguous()


def draw_boxes(
    boxes: Sequence[Box],
    size: tuple[int, int],
    texts: Sequence[str] = (),
    colours: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return outlines of boxes on white, each with its text if there are any: bytes (3, H, W).

    colours: (R, G, B) of each box, by default those of `palette`.
    """
    height, width = size
    colours = palette(len(boxes)).tolist() if colours is None else colours
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    for i, (left, top, box_width, box_height) in enumerate(boxes):
        x, y = round(left * (width - 1)), round(top * (height - 1))
        far = (round((left + box_width) * (width - 1)), round((top + box_height) * (height - 1)))
        pen.rectangle((x, y, *far), outline=tuple(colours[i]), width=max(1, min(size) // 128))
        if texts:
            pen.text((x + 2, y + 1), texts[i], fill=tuple(colours[i]))
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


class ImageWriter:
    """Write images into `folder`; no existing file is overwritten.

    columns: of the grid, which shows the first `grid_limit` images, at most 64 million pixels in all; what would take
    more is left out of it, and told.
    """

    def __init__(self, folder: str | Path, columns: int = 4, grid_limit: int = GRID_LIMIT) -> None:
        self.folder = Path(folder)
        self.columns = columns
        self.grid_limit = grid_limit
        self.entries: list[dict[str, Any]] = []
        self._cells: list[Tensor] = []
        self._cell_size = (0, 0)
        self._left_out = 0
        self._next_sample: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._next_grid = _next_number(self.folder, r"grid-(\d+)\.(?:png|json)")
        except OSError as error:
            raise UserError(f"--outdir {folder}: cannot be made ({error.strerror})") from error

    def add(
        self, image: Tensor, details: Mapping[str, Any], name: str | None = None, source: Tensor | None = None
    ) -> None:
        """Write bytes (C, H, W), as an array (H, W, C) where PNG has no mode for them.

        details: for the record; name: of the file, without it files are numbered; source: bytes (C', H', W') to show
        left of the image in the grid.
        """
        suffix = ".png" if len(image) in _MODES else ".npy"
        file = self._numbered(suffix) if name is None else self._unused(name, suffix)
        if suffix == ".png":
            to_pil(image).save(self.folder / file)
        else:
            np.save(self.folder / file, rearrange(image, "c h w -> h w c").numpy())
        self.entries.append({"file": file, **details})
        cell = side_by_side([_visible(shown) for shown in (source, image) if shown is not None])
        if len(self._cells) < self.grid_limit:
            size = (max(self._cell_size[0], cell.shape[1]), max(self._cell_size[1], cell.shape[2]))
            if math.prod(size) * self._num_cells(len(self._cells) + 1) <= _GRID_PIXELS:
                self._cells.append(cell)
                self._cell_size = size
            else:
                self._left_out += 1

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write the grid and the record of all images; return the path of the record."""
        stem = self.folder / f"grid-{self._next_grid:04}"
        if self._cells:
            channels = max(len(cell) for cell in self._cells)
            cells = torch.stack([_padded(cell, channels, *self._cell_size) for cell in self._cells])
            to_pil(image_grid(cells, self.columns)).save(stem.with_suffix(".png"))
        if self._left_out:
            _log.info("%s.png leaves out %d images, which would make its cells too large", stem, self._left_out)
        content = _without_infinity({**record, **environment(), "samples": self.entries})
        stem.with_suffix(".json").write_text(
            writable(json.dumps(content, indent=2, ensure_ascii=False)) + "\n", encoding="utf-8"
        )
        return stem.with_suffix(".json")

    def _num_cells(self, images: int) -> int:
        return math.ceil(images / self.columns) * min(self.columns, images)

    def _numbered(self, suffix: str) -> str:
        if self._next_sample is None:
            (self.folder / "samples").mkdir(exist_ok=True)
            self._next_sample = _next_number(self.folder / "samples", r"(\d+)\.(?:png|npy)")
        self._next_sample += 1
        return f"samples/{self._next_sample - 1:05}{suffix}"

    def _unused(self, name: str, suffix: str) -> str:
        file, number = f"{name}{suffix}", 0
        while (self.folder / file).exists():
            number += 1
            file = f"{name}-{number}{suffix}"
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        return file


def _without_infinity(value: Any) -> Any:
    """Return a record with texts in place of the numbers that JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: _without_infinity(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _visible(image: Tensor) -> Tensor:
    """Return channels for which there is no colour one next to the other, as greys."""
    return image if len(image) in _MODES else rearrange(image, "c h w -> 1 h (c w)")


def _next_number(folder: Path, pattern: str) -> int:
    matches = (re.fullmatch(pattern, file.name) for file in folder.iterdir())
    return max((int(match.group(1)) + 1 for match in matches if match), default=0)
