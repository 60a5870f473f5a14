"""The data of runs as the network sees them: items of a split as plain values, images as files that a browser shows."""

from __future__ import annotations

import base64
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ldm import compat, config
from ldm.config.files import config_of_run
from ldm.data.core.classes import class_names
from ldm.data.core.module import iterate
from ldm.errors import UserError
from ldm.images import colour_classes, to_pil, to_rgb_bytes

_KEPT, _OF_A_STREAM = 4, 60  # data sets, and items that are read of a stream
_LEVELS = 256  # of a grey image
_LONGEST = 2000  # characters of a text that are shown


class RunData:
    """Data sets of runs, built from their configs when they are first asked for; the last few are kept.

    They are read by one visitor at a time, as not every reader of files can serve several.
    """

    def __init__(self) -> None:
        self._sets: OrderedDict[tuple[Path, str], Dataset | list[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def page(
        self, run: Path, split: str, first: int, count: int = 12, decode: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Any]:
        """Return the number of items of a split, and `count` of them as `plain` values. UserError if there are none.

        decode: What a first stage leaves of an image (C, H, W), shown beside it.
        """
        with self._lock:
            items, names = self._items(run, split), class_names(self._set(run, split))
            chosen = [items[index] for index in range(first, min(first + count, len(items)))]
        if not chosen:
            raise UserError(f"item {first}: data.params.{split} of {run.name} has {len(items)}")
        if decode is not None:
            chosen = [{**item, "decoded": decode(item["image"])} if "image" in item else item for item in chosen]
        return {"total": len(items), "first": first, "items": [plain(item, names) for item in chosen]}

    def item(self, run: Path, index: int, split: str = "validation") -> Mapping[str, Any]:
        """Return an item as it is. UserError if there is none of that number."""
        with self._lock:
            items = self._items(run, split)
            if not 0 <= index < len(items):
                raise UserError(f"item {index}: data.params.{split} of {run.name} has {len(items)}")
            return items[index]

    def class_names(self, run: Path) -> list[str]:
        """Return the names of the classes by label, empty if the data set knows none."""
        with self._lock:
            return class_names(self._set(run, "validation"))

    def _items(self, run: Path, split: str) -> Any:
        dataset = self._set(run, split)
        return dataset.first if isinstance(dataset, _Stream) else dataset

    def _set(self, run: Path, split: str) -> Any:
        key = (run, split)
        if key not in self._sets:
            self._sets[key] = _built(run, split)
            while len(self._sets) > _KEPT:
                self._sets.popitem(last=False)
        self._sets.move_to_end(key)
        return self._sets[key]


class _Stream:
    """The first items of a stream, read once."""

    def __init__(self, dataset: IterableDataset) -> None:
        self.class_names = class_names(dataset)
        self.first = list(islice(iterate(dataset), _OF_A_STREAM))


def _built(run: Path, split: str) -> Dataset | _Stream:
    """Build a data set of a run. UserError if its config has none of this name, or files that it names are gone."""
    file = config_of_run(run)
    if file is None:
        raise UserError(f"{run}: has no config; is it a run folder?")
    content, place = compat.translate(compat.read(file)), f"data.params.{split}"
    data = content.get("data")
    node = (data.get("params") or {}).get(split) if isinstance(data, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{run.name}: its config has no {place}")
    dataset = config.instantiate(node, place)
    return _Stream(dataset) if isinstance(dataset, IterableDataset) else dataset


def plain(item: Mapping[str, Any], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the entries of an item as {key, kind, ...} that JSON can hold.

    Kinds: `image` with `png`, a data: address; `map` with `png` in colours and `levels`, the same as indices in grey;
    `boxes`; `label`, one of a class; `text`.
    """
    entries = []
    for key, value in item.items():
        if key == "boxes" and "box_labels" in item:
            entries.append({"key": key, "kind": "boxes", "boxes": _boxes(value, item["box_labels"], names)})
        elif key != "box_labels" or "boxes" not in item:
            entries.append({"key": key, **_entry(key, value, names)})
    return entries


def _entry(key: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    value = torch.as_tensor(value) if isinstance(value, np.ndarray) else value
    if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
        return {"kind": "image", "png": png_address(to_rgb_bytes(value[None])[0])}
    if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
        fits = int(value.max()) < _LEVELS and int(value.min()) >= -1
        levels = png_address((value % _LEVELS).to(torch.uint8)[None]) if fits else None  # -1, no class, is 255
        return {"kind": "map", "png": png_address(colour_classes(value)), "levels": levels}
    if key == "class_label" and isinstance(value, int | np.integer):
        return {"kind": "label", "label": int(value), "name": _name(int(value), names)}
    if isinstance(value, Tensor) and value.ndim:
        return {"kind": "text", "text": f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"}
    value = value.item() if isinstance(value, Tensor | np.generic) else value
    return {"kind": "text", "text": str(value)[:_LONGEST]}


def _boxes(boxes: Any, labels: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    known = zip(torch.as_tensor(boxes).tolist(), torch.as_tensor(labels).tolist(), strict=True)
    return [
        {"label": label, "name": _name(label, names), "box": box}
        for box, label in known
        if label >= 0 and all(map(math.isfinite, box))
    ]


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def png_of(image: Tensor) -> bytes:
    """Return bytes (C, H, W) as a PNG file; channels for which it has no mode are projected to colours."""
    if len(image) not in (1, 3, 4):
        image = to_rgb_bytes(image[None].float() / 127.5 - 1)[0]
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="png")
    return buffer.getvalue()


def png_address(image: Tensor) -> str:
    """Return bytes (C, H, W) as the address of a PNG file that holds it, data:image/png;base64,..."""
    return "data:image/png;base64," + base64.b64encode(png_of(image)).decode()
