"""Images with the boxes of their objects, for layout-to-image synthesis (section 4.3.1): COCO and OpenImages.

`boxes` float32 (N, 4) are left, top, width, height in [0, 1], `box_labels` int64 (N,) the classes, with N =
max_objects; absent objects have zeros and the label -1. x runs to the right, y downwards.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ldm.bounds import Count, Natural, NonNegative, Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import DecodedImage
from ldm.data.core.files import existing_folder, find_images
from ldm.data.core.transforms import CropParams
from ldm.data.layout.annotations import Annotations, read_coco, read_open_images
from ldm.errors import UserError

__all__ = ["CocoLayouts", "OpenImagesLayouts"]

_ABSENT = -1
_log = logging.getLogger(__name__)


class LayoutDataset(ImageDataset):
    """Images with boxes, clipped to the image and to the crop; a subclass reads the annotations.

    The order of the objects is random, as in the training of the released model.

    Args:
        max_objects: the largest objects in the crop are kept; absent ones fill the rest.
        min_objects: images with fewer objects are left out.
        min_area: the smallest fraction of the image that a box covers; smaller boxes are dropped.
        whole: return boxes in the whole image, flipped with it, and the box of the crop under `crop` (4,); the
            released model was trained so.
        kwargs: the options of `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Sides,
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
        """Return the paths of the images below `root` by their names in the annotations."""

    def _index_annotated(self, annotations: Annotations, source: str) -> None:
        """Keep the images that exist, and have enough objects."""
        files = self._files()
        annotations, counts = annotations.clipped(self.min_area)
        if any(counts):
            _log.warning("%s: boxes are %s", source, counts.describe())
        self.class_names = annotations.class_names
        present = [i for i, name in enumerate(annotations.names) if name in files]
        absent = len(annotations.names) - len(present)
        if annotations.names and not present:
            first = annotations.names[0]
            raise UserError(f"{source}: none of its {absent} images is below {self.root}, first {first}; set root")
        enough = [i for i in present if annotations.num_boxes(i) >= self.min_objects]
        if len(enough) < len(annotations.names):
            _log.warning(
                "%s: %d images are not below %s, %d have fewer than %d objects; they are left out",
                source, absent, self.root, len(present) - len(enough), self.min_objects,
            )  # fmt: skip
        kept = self._index([files[annotations.names[i]] for i in enough], source)
        self._annotations = annotations.select([enough[i] for i in kept])

    def _read_crop_fields(
        self, file: int, image: DecodedImage, crop: CropParams, rng: np.random.Generator
    ) -> dict[str, Any]:
        boxes, labels, shape = self._annotations.of_image(file)
        if shape is not None and abs(shape[0] * image.height - shape[1] * image.width) > max(image.size):
            raise ValueError(f"it is {image.height}x{image.width}, its annotations say {shape[1]}x{shape[0]}")
        region = np.array([crop.left, crop.top, self.transform.width, self.transform.height], np.float32)
        region /= np.array([crop.width, crop.height, crop.width, crop.height], np.float32)
        cropped = crop_boxes(boxes, region)
        visible = np.flatnonzero((cropped[:, 2:] > 0).all(axis=1))
        largest = visible[np.argsort(-cropped[visible, 2] * cropped[visible, 3], kind="stable")][: self.max_objects]
        largest = rng.permutation(largest)
        chosen = (boxes if self.whole else cropped)[largest]
        return {
            "boxes": self._padded(flip_boxes(chosen) if crop.flip else chosen, 0.0),
            "box_labels": self._padded(labels[largest].astype(np.int64), _ABSENT),
            **({"crop": torch.from_numpy(flip_boxes(region) if crop.flip else region)} if self.whole else {}),
        }

    def _padded(self, values: np.ndarray, filler: float) -> torch.Tensor:
        padded = np.full((self.max_objects, *values.shape[1:]), filler, values.dtype)
        padded[: len(values)] = values
        return torch.from_numpy(padded)


class CocoLayouts(LayoutDataset):
    """Read the images below `root` that COCO's `instances_*.json` describes, with their boxes.

    Classes are numbered in the order of their ids; `class_names` lists them. stuff: `stuff_*.json`, whose boxes are
    added, without its class 'other'. use_group: the label of a crowd is class + number of classes, as a tokenizer with
    use_group expects. For the other options see `LayoutDataset` and `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str | Path,
        size: Sides,
        max_objects: Count = 30,
        stuff: str | Path | None = None,
        use_group: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size, max_objects, **kwargs)
        read = read_coco([Path(path).expanduser() for path in (annotations, stuff) if path is not None], use_group)
        self._index_annotated(read, str(annotations))

    def _files(self) -> dict[str, str]:
        return {name: name for name in find_images(self.root)}


class OpenImagesLayouts(LayoutDataset):
    """Read the OpenImages images below `root`, ID.jpg at any depth, with their boxes.

    Args:
        boxes_csv: e.g. oidv6-train-annotations-bbox.csv.
        classes_csv: the classes to use, e.g. class-descriptions-boxable.csv or some of its lines; they are numbered in
            the order of their ids.
        use_group, use_attributes: add to a label the number of classes times 1 for groups, 2 occluded, 4 depiction, 8
            inside, as a tokenizer with the same options expects.
        kwargs: the options of `LayoutDataset` and `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        boxes_csv: str | Path,
        classes_csv: str | Path,
        size: Sides,
        max_objects: Count = 30,
        use_group: bool = False,
        use_attributes: bool = False,
        min_area: NonNegative = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size, max_objects, min_area=min_area, **kwargs)
        paths = Path(boxes_csv).expanduser(), Path(classes_csv).expanduser()
        self._index_annotated(read_open_images(*paths, use_group, use_attributes), str(boxes_csv))

    def _files(self) -> dict[str, str]:
        return {PurePosixPath(name).stem: name for name in find_images(self.root)}


def crop_boxes(boxes: np.ndarray, crop: np.ndarray) -> np.ndarray:
    """Return boxes (N, 4) in fractions of a crop (4,), clipped to it; those outside have a width or height of 0."""
    near = (np.maximum(boxes[:, :2], crop[:2]) - crop[:2]) / crop[2:]
    far = (np.minimum(boxes[:, :2] + boxes[:, 2:], crop[:2] + crop[2:]) - crop[:2]) / crop[2:]
    near, far = near.clip(0, 1), far.clip(0, 1)
    return np.concatenate([near, (far - near).clip(0)], axis=1).astype(np.float32)


def flip_boxes(boxes: np.ndarray) -> np.ndarray:
    """Flip boxes (..., 4) horizontally."""
    flipped = boxes.copy()
    flipped[..., 0] = (1 - (boxes[..., 0] + boxes[..., 2])).clip(0)
    return flipped
