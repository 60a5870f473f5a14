"""Images with a target of the same name in another folder: maps of classes, smaller versions, any other image.

The target gets the crop and the flip of its image (sections 4.3.2 and 4.4 of the paper, for your own pairs).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.bounds import Count, Sides
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import DecodedImage
from ldm.data.core.files import existing_folder
from ldm.data.core.transforms import CropParams, ImageTransform
from ldm.data.image_pairs.paired_files import (
    align_crop,
    check_same_shape,
    crop_index_map,
    crop_target,
    find_pairs,
    name_file_in_errors,
    read_indices,
)
from ldm.errors import UserError

__all__ = ["ADE20K", "PairedFolder", "TargetFolder"]


class TargetFolder(ImageDataset):
    """Images with a target file each; a subclass calls `_index_pairs`, and sets `key` and `_reader`.

    Images without a target are left out, pairs of different shape skipped; both are logged.
    """

    def _index_pairs(self, root: str | Path, target_root: str | Path, suffix: str = "") -> None:
        """Keep the images below `root` that have a target, see `find_pairs`."""
        self.root = existing_folder(root)
        targets = find_pairs(self.root, target_root, suffix)
        self._index(targets, str(root))
        self._targets = [targets[name] for name in self.names]

    def _read_crop_fields(
        self, file: int, image: DecodedImage, crop: CropParams, rng: np.random.Generator
    ) -> dict[str, Any]:
        path = self._targets[file]
        with name_file_in_errors(path):
            return self._read_target(file, path, image, crop)

    def _read_target(self, file: int, path: Path, image: DecodedImage, crop: CropParams) -> dict[str, Any]:
        """Return the keys of the target of a file."""
        return {self.key: self._reader.read(path, image, crop)}


@dataclass(frozen=True)
class _IndexMaps:
    """Read targets as class indices int64 (height, width), by nearest neighbours; `ignore_index` becomes -1."""

    height: int
    width: int
    num_classes: int
    ignore_index: int | None = None

    def read(self, path: Path, image: DecodedImage, crop: CropParams) -> Tensor:
        """Read the crop of a map. Raises UserError, with the file, for an index outside 0..num_classes - 1."""
        indices = read_indices(path)
        check_same_shape(image, indices.shape[1], indices.shape[0])
        wrong = [int(i) for i in np.unique(indices) if i != self.ignore_index and not 0 <= i < self.num_classes]
        if wrong:  # sorted
            remedy = "raise num_classes, or set" if wrong[-1] >= self.num_classes else "set"
            raise UserError(
                f"{path}: class index {wrong[-1]}, but num_classes={self.num_classes} allows 0 to "
                f"{self.num_classes - 1}; {remedy} ignore_index: {wrong[-1]} if it means 'no class'"
            )
        cropped = crop_index_map(indices, crop, self.height, self.width)
        return torch.from_numpy(np.where(cropped == self.ignore_index, -1, cropped))


@dataclass(frozen=True)
class _TargetImages:
    """Read targets as images in [-1, 1] of the size of `transform`, smaller by `factor` than that of `source`."""

    transform: ImageTransform
    source: ImageTransform
    factor: int

    def read(self, path: Path, image: DecodedImage, crop: CropParams) -> Tensor:
        """Read the crop of a target. Raises ValueError for one of another shape."""
        target, size = self.transform.open(path), (self.transform.width, self.transform.height)
        check_same_shape(image, target.width, target.height, self.factor)
        cropped = crop_target(target, image, crop, size, self.factor, self.source.filter)
        return self.transform.apply(cropped, CropParams(*size, flip=crop.flip))


class PairedFolder(TargetFolder):
    """Read the images below `root` and, under `key`, the target of each: the same path below `target_root`.

    Raises UserError if no image has a target, for maps that are not index maps, and for an index outside
    0..num_classes - 1.

    Args:
        num_classes: if given, targets are maps of class indices, int64 (H, W), resized by nearest neighbours.
            Otherwise they are images (C, H / factor, W / factor) in [-1, 1].
        factor: 4 for targets of a quarter of the size.
        ignore_index: pixels of this index belong to no class and become -1.
        suffix: `_mask` for pairs `a.jpg`, `a_mask.png`, which may be in one folder.
        target_channels: channels of the targets, by default those of the images.
        kwargs: the options of `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Sides,
        target_root: str | Path,
        key: str = "segmentation",
        num_classes: Count | None = None,
        factor: Count = 1,
        ignore_index: int | None = None,
        suffix: str = "",
        target_channels: Count | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        source = self.transform
        height, width = source.height, source.width
        if factor < 1 or height % factor or width % factor or (num_classes is not None and factor > 1):
            raise UserError(f"{root}: factor {factor} must divide size {height}x{width}, and be 1 with num_classes")
        if (num_classes is not None and num_classes < 1) or (num_classes is None and ignore_index is not None):
            raise UserError(f"{root}: num_classes {num_classes} must be positive, and be given with ignore_index")
        self.key, self.factor = key, factor
        if num_classes is not None:
            self._reader = _IndexMaps(height, width, num_classes, ignore_index)
        else:
            channels = source.channels if target_channels is None else target_channels
            small = ImageTransform(
                [height // factor, width // factor], "none", channels=channels, value_range=source.value_range
            )
            self._reader = _TargetImages(small, source, factor)
        self._index_pairs(root, target_root, suffix)

    def _sample_crop(self, image: DecodedImage, rng: np.random.Generator) -> CropParams:
        return align_crop(super()._sample_crop(image, rng), self.factor)


class ADE20K(TargetFolder):
    """Read ADE20K as released for scene parsing, with maps of indices (H, W) under `key`: 0 for none, then 150 classes.

    root: `ADEChallengeData2016`, with training/ and validation/ in images/ and in annotations/. split: "train" or
    "validation". For the other options see `ImageDataset`.
    """

    _FOLDERS = {"train": "training", "validation": "validation"}

    def __init__(
        self,
        root: str | Path,
        size: Sides,
        split: str = "train",
        key: str = "segmentation",
        **kwargs: Any,
    ) -> None:
        if split not in self._FOLDERS:
            raise UserError(f"ADE20K: split {split!r} is not one of {', '.join(self._FOLDERS)}")
        super().__init__(size, **kwargs)
        self.key = key
        self._reader = _IndexMaps(self.transform.height, self.transform.width, num_classes=151)
        name = self._FOLDERS[split]
        self._index_pairs(Path(root) / "images" / name, Path(root) / "annotations" / name)
