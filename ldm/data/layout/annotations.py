"""Boxes of objects from the files of COCO and OpenImages, in flat arrays, since there are millions of them.

Legend: M boxes of F images; a box is left, top, width, height in fractions of its image.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.core.files import read_json
from ldm.errors import UserError

__all__ = ["Annotations", "Counts", "read_coco", "read_open_images"]

_OTHER = "other"  # COCO-stuff's class of everything that has no class
_CORNERS = ("XMin", "XMax", "YMin", "YMax")
_ATTRIBUTES = {"IsOccluded": 2, "IsDepiction": 4, "IsInside": 8}
# What entries of COCO are, apart from numbers of pixels.
_PLAIN = {
    **dict.fromkeys(("id", "image_id", "category_id"), int | str), **dict.fromkeys(("file_name", "name"), str),
}  # fmt: skip
_SLACK = 1e-6  # of coordinates beyond the border that come from rounding


class Counts(NamedTuple):
    """The numbers of boxes that were clipped or dropped."""

    clipped: int
    dropped: int
    unknown: int

    def describe(self) -> str:
        """Return the counts as a text."""
        small, other = f"degenerate or too small: {self.dropped}", f"of other classes: {self.unknown}"
        return f"clipped to the image: {self.clipped}, {small}, {other}"


@dataclass(frozen=True)
class Annotations:
    """Boxes (M, 4) with labels (M,), sorted by image: those of image i are boxes[offsets[i] : offsets[i + 1]].

    shapes (F, 2): width and height of the images, if the annotations have them. unknown: the number of boxes of other
    classes, which are left out.
    """

    names: list[str]
    class_names: list[str]
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    shapes: np.ndarray | None = None
    unknown: int = 0

    @classmethod
    def from_lists(
        cls, names: list[str], class_names: list[str], owners: array, boxes: array, labels: array, **more: Any
    ) -> Annotations:
        """Sort boxes (M * 4 numbers) by `owners` (M), the numbers of their images."""
        owners = np.frombuffer(owners, np.int32) if len(owners) else np.zeros(0, np.int32)
        order = np.argsort(owners, kind="stable")
        offsets = np.searchsorted(owners[order], np.arange(len(names) + 1))
        rows = np.array(boxes, np.float32).reshape(-1, 4)[order]
        return cls(names, class_names, offsets, rows, np.array(labels, np.int32)[order], **more)

    def num_boxes(self, image: int) -> int:
        """Count the boxes of an image."""
        return int(self.offsets[image + 1] - self.offsets[image])

    def of_image(self, image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return the boxes (n, 4) and labels (n,) of an image, and its width and height if known."""
        rows = slice(self.offsets[image], self.offsets[image + 1])
        return self.boxes[rows], self.labels[rows], None if self.shapes is None else self.shapes[image]

    def clipped(self, min_area: float) -> tuple[Annotations, Counts]:
        """Clip boxes to their images; drop those that are then degenerate or cover less than min_area."""
        near, far = self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]
        with np.errstate(invalid="ignore"):
            inside = np.concatenate([near.clip(0, 1), far.clip(0, 1) - near.clip(0, 1)], axis=1)
            is_clipped = ((near < -_SLACK) | (far > 1 + _SLACK)).any(axis=1)
            is_kept = (inside[:, 2:] > 0).all(axis=1) & (inside[:, 2] * inside[:, 3] >= min_area)
        counts = Counts(int((is_clipped & is_kept).sum()), int((~is_kept).sum()), self.unknown)
        offsets = np.concatenate([[0], np.cumsum(is_kept)])[self.offsets]
        return replace(self, offsets=offsets, boxes=inside[is_kept], labels=self.labels[is_kept]), counts

    def select(self, images: Sequence[int]) -> Annotations:
        """Return the annotations of some images, in this order."""
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images]
        flat = np.concatenate(rows) if rows else np.zeros(0, int)
        return replace(
            self,
            names=[self.names[i] for i in images],
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(int),
            boxes=self.boxes[flat],
            labels=self.labels[flat],
            shapes=None if self.shapes is None else self.shapes[list(images)],
        )


def read_coco(paths: Sequence[Path], use_group: bool = False) -> Annotations:
    """Read instances_*.json, and add the boxes of other files such as stuff_*.json.

    Raises UserError for files that cannot be read or are not in COCO's format. use_group: see `CocoLayouts`.
    """
    documents = [_coco_document(path) for path in paths]
    categories = {item["id"]: item["name"] for document in documents for item in document["categories"]}
    ids = sorted((number for number, name in categories.items() if name != _OTHER), key=_numbers_first)
    rank = {number: i for i, number in enumerate(ids)}
    images = {item["id"]: item for document in documents for item in document["images"]}
    position = {number: i for i, number in enumerate(images)}
    owners, boxes, labels, unknown = array("i"), array("d"), array("i"), 0
    for path, document in zip(paths, documents, strict=True):
        for item in document["annotations"]:
            if item["category_id"] not in rank:
                unknown += 1
                continue
            image = _coco_image(images, item, path)
            boxes.extend(_coco_box(item, image, path))
            owners.append(position[item["image_id"]])
            labels.append(rank[item["category_id"]] + len(ids) * (use_group and bool(item.get("iscrowd"))))
    names = [item["file_name"] for item in images.values()]
    shapes = np.array([[item["width"], item["height"]] for item in images.values()]).reshape(-1, 2)
    if shapes.dtype.kind not in "iuf":
        raise UserError(f"{paths[0]}: width and height of an image are no numbers")
    class_names = [categories[number] for number in ids]
    return Annotations.from_lists(names, class_names, owners, boxes, labels, shapes=shapes, unknown=unknown)


def _coco_document(path: Path) -> dict[str, Any]:
    document = read_json(path, str(path))
    parts = ("images", "annotations", "categories")
    absent = [key for key in parts if not isinstance(document, dict) or key not in document]
    if absent:
        raise UserError(f"{path}: has no {absent[0]!r}; give COCO's instances_*.json or one in its form")
    needed = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name")}
    needed["annotations"] = ("image_id", "category_id", "bbox")
    for part, keys in needed.items():
        if not isinstance(document[part], list):
            raise UserError(f"{path}: {part} is no list; give COCO's instances_*.json or one in its form")
        for number, item in enumerate(document[part]):
            if not isinstance(item, dict):
                raise UserError(f"{path}: {part}[{number}] is {item!r}, no object with {', '.join(keys)}")
            lacking = [key for key in keys if key not in item]
            if lacking:
                raise UserError(f"{path}: {part}[{number}] has no {lacking[0]!r}, which boxes need")
            for key, kind in _PLAIN.items():
                if key in keys and not isinstance(item[key], kind):
                    raise UserError(f"{path}: {part}[{number}]: {key!r} is {item[key]!r}, neither number nor text")
    return document


def _numbers_first(number: int | str) -> tuple[bool, int | str]:
    return isinstance(number, str), number


def _coco_image(images: dict[Any, dict[str, Any]], item: dict[str, Any], path: Path) -> dict[str, Any]:
    if item["image_id"] not in images:
        raise UserError(f"{path}: an annotation is of image_id {item['image_id']}, which is not among its images")
    return images[item["image_id"]]


def _coco_box(item: dict[str, Any], image: dict[str, Any], path: Path) -> tuple[float, ...]:
    box, size = item["bbox"], (image["width"], image["height"]) * 2
    box = [0, 0, 0, 0] if box == [] else box  # dropped and counted like boxes without area
    if not (isinstance(box, list) and len(box) == 4 and _are_numbers([*box, *size])) or min(size) <= 0:
        raise UserError(f"{path}: a box of {image['file_name']} is {box}, not [left, top, width, height] in pixels")
    return tuple(side / whole for side, whole in zip(box, size, strict=True))


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def read_open_images(
    boxes_csv: Path, classes_csv: Path, use_group: bool = False, use_attributes: bool = False
) -> Annotations:
    """Read OpenImages' boxes of the classes in classes_csv (lines `/m/011k07,Tortoise`).

    Raises UserError for files that cannot be read, lack a column, or have coordinates that are not numbers.
    """
    classes = {row[0]: row[-1] for row in _rows(classes_csv) if row and row[0] != "LabelName"}
    ids = sorted(classes)
    rank = {label: i for i, label in enumerate(ids)}
    rows = _rows(boxes_csv)
    header = next(rows, [])
    flags = {"IsGroupOf": 1} if use_group else {}
    flags |= _ATTRIBUTES if use_attributes else {}
    lacking = [name for name in ("ImageID", "LabelName", *_CORNERS, *flags) if name not in header]
    if lacking:
        raise UserError(f"{boxes_csv}: has no column {lacking[0]!r}, it has {', '.join(header)}")
    column = {name: i for i, name in enumerate(header)}
    position: dict[str, int] = {}
    owners, boxes, labels, unknown = array("i"), array("d"), array("i"), 0
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(f"{boxes_csv}: line {number} has {len(row)} fields, the header {len(header)}")
        label = rank.get(row[column["LabelName"]])
        if label is None:
            unknown += 1
            continue
        try:
            left, right, top, bottom = (float(row[column[name]]) for name in _CORNERS)
        except ValueError as error:
            raise UserError(f"{boxes_csv}: line {number}: {error}") from error
        owners.append(position.setdefault(row[column["ImageID"]], len(position)))
        boxes.extend((left, top, right - left, bottom - top))
        modifier = sum(bit for name, bit in flags.items() if row[column[name]] == "1")
        labels.append(label + len(ids) * modifier)
    class_names = [classes[label] for label in ids]
    return Annotations.from_lists(list(position), class_names, owners, boxes, labels, unknown=unknown)


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from csv.reader(stream)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
