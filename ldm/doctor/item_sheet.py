"""A sheet of items as the network sees them: a row each, with every picture, map, mask, layout and text beside it."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.cli.box_files import Placed, draw_boxes
from ldm.training.callbacks import grid

_LEAST_SIDE, _TEXT_WIDTH, _LETTERS, _HEAD, _GAP = 128, 220, 34, 16, 4
_NO_CLASS = (0, 0, 0)


def item_sheet(items: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw items one below the other; a row is as high as the largest picture in it."""
    rows = [_panels(item) for item in items]
    heads = list(dict.fromkeys(name for row in rows for name in row))
    widths = {name: max(row[name].width for row in rows if name in row) for name in heads}
    heights = [max(panel.height for panel in row.values()) for row in rows]
    width = sum(widths.values()) + _GAP * (len(heads) + 1)
    sheet = Image.new("RGB", (width, _HEAD + sum(heights) + _GAP * (len(rows) + 1)), "white")
    pen, x = ImageDraw.Draw(sheet), _GAP
    for name in heads:
        pen.text((x, 2), name, fill="black")
        y = _HEAD + _GAP
        for row, height in zip(rows, heights, strict=True):
            if name in row:
                sheet.paste(row[name], (x, y))
            y += height + _GAP
        x += widths[name] + _GAP
    return sheet


def _panels(item: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Draw each key that can be seen; all others go into one panel of text."""
    size = _size(item)
    panels: dict[str, Image.Image] = {}
    texts: list[str] = []
    for key, value in item.items():
        if key == "box_labels" and "boxes" in item:
            continue
        if key == "boxes" and "box_labels" in item:
            panels[key] = _layout(value, item["box_labels"], size)
        elif isinstance(value, Tensor) and value.ndim == (3 if value.is_floating_point() else 2):
            panels[key] = _picture(value, size)
        else:
            texts.append(f"{key}: {list(value.shape) if isinstance(value, Tensor) and value.ndim else value}")
    if texts:
        panels["others"] = _text(texts, size[0])
    return panels


def _size(item: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width at which the pictures of an item are shown: small ones by a whole factor larger."""
    image = item.get("image")
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (_LEAST_SIDE, _LEAST_SIDE)
    factor = max(1, -(-_LEAST_SIDE // min(height, width)))
    return height * factor, width * factor


def _picture(value: Tensor, size: tuple[int, int]) -> Image.Image:
    pixels = grid(value[None], 1).numpy() if value.is_floating_point() else _painted(value)  # (H, W, 3)
    return Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST)


def _painted(classes: Tensor) -> np.ndarray:
    """Return each class of a map (H, W) a colour of its own, and black to pixels without one, -1."""
    count = int(classes.max()) + 1
    hues = [colorsys.hsv_to_rgb(i * 0.618 % 1, 0.5 + 0.5 * (i % 2), 1 - 0.3 * (i % 3) / 2) for i in range(count)]
    palette = np.array([*(tuple(round(255 * part) for part in hue) for hue in hues), _NO_CLASS], np.uint8)
    return palette[classes.numpy()]


def _layout(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Image.Image:
    placed = [
        Placed(label, tuple(box)) for box, label in zip(boxes.tolist(), labels.tolist(), strict=True) if label >= 0
    ]
    return Image.fromarray(draw_boxes(placed, size, {}).permute(1, 2, 0).contiguous().numpy())


def _text(texts: Sequence[str], height: int) -> Image.Image:
    lines = [line for text in texts for line in textwrap.wrap(text, _LETTERS) or [""]]
    panel = Image.new("RGB", (_TEXT_WIDTH, height), "white")
    spelled = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")  # what PIL's own font has letters for
    ImageDraw.Draw(panel).multiline_text((2, 2), spelled, fill="black")
    return panel
