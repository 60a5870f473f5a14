"""A sheet of items as the network sees them: a row each, with every image, map, mask, layout and text beside it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from ldm.images import colour_classes, draw_boxes, to_pil, to_rgb_bytes

_LEAST_SIDE, _TEXT_WIDTH, _LETTERS, _HEAD, _GAP = 128, 220, 34, 16, 4


def item_sheet(items: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw items one below the other; a row is as high as the largest image in it."""
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
    """Return the height and width at which the images of an item are shown: small ones by a whole factor larger."""
    image = item.get("image")
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (_LEAST_SIDE, _LEAST_SIDE)
    factor = max(1, -(-_LEAST_SIDE // min(height, width)))
    return height * factor, width * factor


def _picture(value: Tensor, size: tuple[int, int]) -> Image.Image:
    image = to_rgb_bytes(value[None])[0] if value.is_floating_point() else colour_classes(value)  # (3, H, W)
    return to_pil(image).resize(size[::-1], Image.Resampling.NEAREST)


def _layout(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Image.Image:
    known = labels >= 0
    return to_pil(draw_boxes(boxes[known].tolist(), size, [str(label) for label in labels[known].tolist()]))


def _text(texts: Sequence[str], height: int) -> Image.Image:
    lines = [line for text in texts for line in textwrap.wrap(text, _LETTERS) or [""]]
    panel = Image.new("RGB", (_TEXT_WIDTH, height), "white")
    spelled = "\n".join(lines).encode("latin-1", "replace").decode("latin-1")  # what PIL's own font has letters for
    ImageDraw.Draw(panel).multiline_text((2, 2), spelled, fill="black")
    return panel
