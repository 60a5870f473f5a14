"""Layouts from JSON files.

A layout is a list of objects, [{"label": 3, "box": [left, top, width, height]}, {"name": "dog", "box": [...]}], in
fractions of the image; a file holds one layout, or a list of layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.data.core.files import read_json, read_text
from ldm.data.layout.boxes import Box
from ldm.data.layout.layouts import crop_boxes
from ldm.errors import UserError

_TOLERANCE = 1e-3  # rounded numbers may stick out of the image by so much
_HUGE = 2**31


class LabelledBox(NamedTuple):
    """One object: its class, and its box left, top, width, height in [0, 1]."""

    label: int
    box: tuple[float, float, float, float]


def read_layouts(path: Path, names: Mapping[str, int], num_classes: int, max_objects: int) -> list[list[LabelledBox]]:
    """Read the layouts of a file. UserError names the object that is wrong: class, box, or one too many."""
    content = read_json(path, f"--layout {path}")
    layouts = content if isinstance(content, list) and content and isinstance(content[0], list) else [content]
    read = []
    for i, layout in enumerate(layouts):
        place = f"{path}, layout {i}" if len(layouts) > 1 else str(path)
        read.append(checked_layout(layout, place, names, num_classes, max_objects))
    return read


def checked_layout(
    layout: Any, place: str, names: Mapping[str, int], num_classes: int, max_objects: int
) -> list[LabelledBox]:
    """Return the objects of one layout. UserError, with its place, names the object that is wrong."""
    if not isinstance(layout, list) or not layout:
        raise UserError(f"{place}: is no list of objects such as [{{'label': 0, 'box': [0.1, 0.1, 0.5, 0.5]}}]")
    if len(layout) > max_objects:
        raise UserError(f"{place}: has {len(layout)} objects; this model takes {max_objects} at most")
    return [_object(item, f"{place}, object {j}", names, num_classes) for j, item in enumerate(layout)]


def _object(item: Any, place: str, names: Mapping[str, int], num_classes: int) -> LabelledBox:
    if not isinstance(item, dict) or "box" not in item or not {"label", "name"} & set(item):
        raise UserError(f"{place}: needs `box` and `label` (a number) or `name`, as in {{'label': 0, 'box': [...]}}")
    label = item.get("label")
    if label is None:
        label = _label_of(item.get("name"), place, names)
    if not _is_number(label, int) or not 0 <= label < num_classes:
        raise UserError(f"{place}: label {label!r} is none of this model's classes 0 to {num_classes - 1}")
    return LabelledBox(label, _box(item["box"], place))


def _label_of(name: Any, place: str, names: Mapping[str, int]) -> int:
    if not isinstance(name, str) or name not in names:
        known = f"known are {', '.join(list(names)[:8])} ..." if names else "give --names, or use `label`"
        raise UserError(f"{place}: the name {name!r} is unknown; {known}")
    return names[name]


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < _HUGE  # which NaN is not either


def _box(box: Any, place: str) -> tuple[float, float, float, float]:
    form = "box must be [left, top, width, height] in fractions of the image"
    is_box = isinstance(box, list) and len(box) == 4 and all(_is_number(side, (int, float)) for side in box)
    if not is_box:
        raise UserError(f"{place}: {form}, not {box!r}")
    left, top, width, height = map(float, box)
    if not (width > 0 and height > 0):
        raise UserError(f"{place}: the box {box} has no area; {form}")
    if min(left, top) < -_TOLERANCE or max(left + width, top + height) > 1 + _TOLERANCE:
        raise UserError(f"{place}: the box {box} lies outside of the image; {form}")
    left, top = max(left, 0.0), max(top, 0.0)
    return left, top, min(width, 1 - left), min(height, 1 - top)


def read_names(path: str | None) -> dict[str, int]:
    """Read class names in the order of their labels: one a line, a JSON list, or JSON name -> label.

    UserError for another content.
    """
    if path is None:
        return {}
    file = Path(path)
    if file.suffix == ".json":
        content = read_json(file, f"--names {path}")
        if isinstance(content, dict) and all(_is_number(label, int) for label in content.values()):
            return content
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise UserError(f'--names {path}: is neither a list of names nor names with whole numbers, {{"dog": 3}}')
    else:
        try:
            content = read_text(file).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--names {path}: cannot be read ({error})") from error
    return {name.strip(): label for label, name in enumerate(content)}


def box_tensors(layout: Sequence[LabelledBox], max_objects: int) -> tuple[Tensor, Tensor]:
    """Return boxes float32 (N, 4), zeros where absent, and labels int64 (N,), -1 where absent; N = max_objects."""
    boxes, labels = torch.zeros(max_objects, 4), torch.full((max_objects,), -1)
    for i, item in enumerate(layout):
        boxes[i], labels[i] = torch.tensor(item.box), item.label
    return boxes, labels


def crop_layout(layout: Sequence[LabelledBox], crop: Box, relative: bool) -> list[LabelledBox]:
    """Return the objects that intersect a crop; `relative` clips them, and returns boxes in fractions of the crop."""
    visible = [item for item in layout if Box(*item.box).overlap(crop) > 0]
    if not relative or not visible:
        return visible
    boxes = crop_boxes(np.array([item.box for item in visible]), np.array(crop))
    return [LabelledBox(item.label, tuple(box)) for item, box in zip(visible, boxes.tolist(), strict=True)]
