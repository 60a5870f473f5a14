"""Pictures with the boxes of their objects, for layout-to-image synthesis (section 4.3.1): COCO and OpenImages.

`boxes` float32 (N, 4) are left, top, width, height in [0, 1], `box_labels` int64 (N,) number the classes; N is
max_objects, absent objects have zeros and the label -1. x runs to the right, y downwards.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ldm.bounds import Count, Natural, NonNegative
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import Picture
from ldm.data.core.transforms import View
from ldm.data.layout.annotations import Annotations, read_coco, read_open_images
from ldm.data.readers.folders import existing_folder, find_files
from ldm.errors import UserError

__all__ = ["CocoLayouts", "OpenImagesLayouts"]

_ABSENT = -1
_log = logging.getLogger(__name__)


class LayoutDataset(ImageDataset):
    """Serve pictures with boxes; a subclass reads the annotations.

    max_objects: the largest are kept; min_objects: pictures with fewer are left out; min_area: the least share of the
    picture that a box covers, smaller and degenerate ones are dropped. Boxes are cut at the picture, and at the crop
    that is seen; objects outside the crop are absent. whole: give boxes of the whole picture instead, mirrored with
    it, and `crop` (4,), the box of what is seen: the released layout model was trained so. The order of the objects is
    drawn, as there.
    """

    def __init__(
        self,
        root: str | Path,
        size: Count | Sequence[Count],
        max_objects: Count = 30,
        min_objects: Natural = 1,
        min_area: NonNegative = 1e-5,
        whole: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        if not 1 <= min_objects <= max_objects or not 0 <= min_area < 1:
            raise UserError(
                f"{root}: needs 1 <= min_objects={min_objects} <= max_objects={max_objects} "
                f"and 0 <= min_area={min_area} < 1"
            )
        self.root = existing_folder(root)
        self.max_objects, self.min_objects, self.min_area, self.whole = max_objects, min_objects, min_area, whole
        self.class_names: list[str] = []

    @abstractmethod
    def _files(self) -> dict[str, str]:
        """Return the paths below root of the pictures by the names that the annotations use."""

    def _take(self, annotations: Annotations, source: str) -> None:
        """Keep the annotated pictures that are there."""
        files = self._files()
        annotations, counts = annotations.cleaned(self.min_area)
        _say(f"{source}: boxes are {counts.describe()}", any(counts))
        self.class_names = annotations.class_names
        present = [i for i, name in enumerate(annotations.names) if name in files]
        absent = len(annotations.names) - len(present)
        if annotations.names and not present:
            first = annotations.names[0]
            raise UserError(f"{source}: none of its {absent} pictures is below {self.root}, first {first}; set root")
        enough = [i for i in present if annotations.num_boxes(i) >= self.min_objects]
        _say(
            f"{source}: {absent} pictures are not below {self.root}, {len(present) - len(enough)} have fewer than "
            f"{self.min_objects} objects; they are left out",
            len(enough) < len(annotations.names),
        )
        kept = self._index([files[annotations.names[i]] for i in enough], source)
        self._annotations = annotations.chosen([enough[i] for i in kept])

    def _read_image(self, file: int) -> Picture:
        return self.transform.open(self.root / self.names[file])

    def _read_seen_fields(self, file: int, image: Picture, view: View, rng: np.random.Generator) -> dict[str, Any]:
        boxes, labels, shape = self._annotations.of(file)
        if shape is not None and abs(shape[0] * image.height - shape[1] * image.width) > max(image.size):
            raise ValueError(f"it is {image.height}x{image.width}, its annotations say {shape[1]}x{shape[0]}")
        crop = np.array([view.left, view.top, self.transform.width, self.transform.height], np.float32)
        crop /= np.array([view.width, view.height, view.width, view.height], np.float32)
        seen = seen_boxes(boxes, crop)
        visible = np.flatnonzero((seen[:, 2:] > 0).all(axis=1))
        largest = visible[np.argsort(-seen[visible, 2] * seen[visible, 3], kind="stable")][: self.max_objects]
        largest = rng.permutation(largest)
        shown = boxes if self.whole else seen
        return {
            "boxes": self._padded(mirrored(shown[largest]) if view.mirrored else shown[largest], 0.0),
            "box_labels": self._padded(labels[largest].astype(np.int64), _ABSENT),
            **({"crop": torch.from_numpy(mirrored(crop) if view.mirrored else crop)} if self.whole else {}),
        }

    def _padded(self, values: np.ndarray, filler: float) -> torch.Tensor:
        padded = np.full((self.max_objects, *values.shape[1:]), filler, values.dtype)
        padded[: len(values)] = values
        return torch.from_numpy(padded)


class CocoLayouts(LayoutDataset):
    """Read the pictures below `root` that COCO's `instances_*.json` describes, with their boxes.

    annotations: that file; stuff: `stuff_*.json`, whose boxes are added (without its class 'other'). Classes are
    numbered in the order of their ids, `class_names` lists them. use_group: crowds have class + number of classes, as a
    tokenizer with use_group expects. For the other options see `LayoutDataset` and `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        size: Count | Sequence[Count],
        max_objects: Count = 30,
        stuff: str | Path | None = None,
        use_group: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size, max_objects, **kwargs)
        read = read_coco([Path(path).expanduser() for path in (annotations, stuff) if path is not None], use_group)
        self._take(read, str(annotations))

    def _files(self) -> dict[str, str]:
        return {name: name for name in find_files(self.root)}


class OpenImagesLayouts(LayoutDataset):
    """Read the OpenImages pictures below `root`, ID.jpg at any depth, with their boxes.

    boxes_csv: e.g. oidv6-train-annotations-bbox.csv; classes_csv: e.g. class-descriptions-boxable.csv, whose lines say
    which classes are used (a shorter file chooses some), numbered in the order of their ids. use_group and
    use_attributes add the number of classes times 1 for groups, 2 occluded, 4 depiction, 8 inside, as a tokenizer with
    the same options expects. For the other options see `LayoutDataset` and `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        boxes_csv: str | Path,
        classes_csv: str | Path,
        size: Count | Sequence[Count],
        max_objects: Count = 30,
        use_group: bool = False,
        use_attributes: bool = False,
        min_area: NonNegative = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size, max_objects, min_area=min_area, **kwargs)
        paths = Path(boxes_csv).expanduser(), Path(classes_csv).expanduser()
        self._take(read_open_images(*paths, use_group, use_attributes), str(boxes_csv))

    def _files(self) -> dict[str, str]:
        return {PurePosixPath(name).stem: name for name in find_files(self.root)}


def seen_boxes(boxes: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """Express boxes (N, 4) in fractions of a crop (4,), cut at it; those outside get a width or height of 0."""
    near = (np.maximum(boxes[:, :2], crop[:2]) - crop[:2]) / crop[2:]
    far = (np.minimum(boxes[:, :2] + boxes[:, 2:], crop[:2] + crop[2:]) - crop[:2]) / crop[2:]
    near, far = near.clip(0, 1), far.clip(0, 1)
    return np.concatenate([near, (far - near).clip(0)], axis=1).astype(np.float32)


def mirrored(boxes: np.ndarray) -> np.ndarray:
    """Flip boxes (..., 4) from left to right."""
    flipped = boxes.copy()
    flipped[..., 0] = (1 - (boxes[..., 0] + boxes[..., 2])).clip(0)
    return flipped


def _say(message: str, needed: bool) -> None:
    if needed:
        _log.warning("%s", message)
