"""Pictures with a partner of the same name in another folder: semantic maps, low-resolution twins, any other picture.

The partner gets the crop and the mirroring of its picture (sections 4.3.2 and 4.4 of the paper, for one's own pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.bounds import Count
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import Picture
from ldm.data.core.transforms import ImageTransform, View
from ldm.data.image_pairs.partners import (
    find_pairs,
    insist_on_same_shape,
    naming,
    read_indices,
    seen_indices,
    seen_picture,
    snapped,
)
from ldm.data.readers.folders import existing_folder
from ldm.errors import UserError

__all__ = ["ADE20K", "PairedFolder"]


class PairedFolder(ImageDataset):
    """Read the pictures below `root` and, under `key`, the partner of each: the same path below `target_root`.

    num_classes: partners are maps of class indices, given as int64 (H, W), resized by nearest neighbours; pixels of
    `ignore_index` belong to no class and become -1. Without it they are pictures, given as (C, H / factor,
    W / factor) in [-1, 1]; factor 4: twins of a quarter of the size; target_channels: their channels, if not the
    picture's. suffix: `_mask` for pairs `a.jpg`, `a_mask.png`, which may then share a folder. Pictures without a
    partner and pairs of different shape are skipped and named. For the other options see `ImageDataset`. Raises
    UserError if no picture has a partner, for a map that is not one, and for an index outside 0..num_classes - 1.
    """

    def __init__(
        self,
        root: str | Path,
        size: Count | Sequence[Count],
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
        height, width = self.transform.height, self.transform.width
        if factor < 1 or height % factor or width % factor or (num_classes is not None and factor > 1):
            raise UserError(f"{root}: factor {factor} must divide size {height}x{width}, and be 1 with num_classes")
        if (num_classes is not None and num_classes < 1) or (num_classes is None and ignore_index is not None):
            raise UserError(f"{root}: num_classes {num_classes} must be positive, and be given with ignore_index")
        self.root, self.key, self.factor = existing_folder(root), key, factor
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self._target_size = (width // factor, height // factor)
        channels = self.transform.channels if target_channels is None else target_channels
        self._target_transform = ImageTransform(
            [height // factor, width // factor], "none", channels=channels, value_range=self.transform.value_range
        )
        partners = find_pairs(self.root, target_root, suffix)
        self._index(partners, str(root))
        self._partners = [partners[name] for name in self.names]

    def _read_image(self, file: int) -> Picture:
        return self.transform.open(self.root / self.names[file])

    def _view(self, image: Picture, rng: np.random.Generator) -> View:
        return snapped(super()._view(image, rng), self.factor)

    def _read_seen_fields(self, file: int, image: Picture, view: View, rng: np.random.Generator) -> dict[str, Any]:
        path = self._partners[file]
        read = self._picture if self.num_classes is None else self._map
        with naming(path):
            return {self.key: read(path, image, view)}

    def _map(self, path: Path, image: Picture, view: View) -> Tensor:
        indices = read_indices(path)
        insist_on_same_shape(image, indices.shape[1], indices.shape[0])
        insist_on_classes(path, indices, self.num_classes, self.ignore_index)
        seen = seen_indices(indices, view, self.transform.height, self.transform.width)
        return torch.from_numpy(np.where(seen == self.ignore_index, -1, seen))

    def _picture(self, path: Path, image: Picture, view: View) -> Tensor:
        target = self._target_transform.open(path)
        insist_on_same_shape(image, target.width, target.height, self.factor)
        seen = seen_picture(target, image, view, self._target_size, self.factor, self.transform.filter)
        return self._target_transform.show(seen, View(*self._target_size, mirrored=view.mirrored))


def insist_on_classes(path: Path, indices: np.ndarray, num_classes: int, ignore_index: int | None) -> None:
    """Raise UserError, naming the file, unless all indices are in 0..num_classes - 1 or to be ignored."""
    wrong = [int(i) for i in np.unique(indices) if i != ignore_index and not 0 <= i < num_classes]  # sorted
    if wrong:
        remedy = "raise num_classes, or set" if wrong[-1] >= num_classes else "set"
        raise UserError(
            f"{path}: class index {wrong[-1]}, but num_classes={num_classes} allows 0 to {num_classes - 1}; "
            f"{remedy} ignore_index: {wrong[-1]} if it means 'no class'"
        )


class ADE20K(PairedFolder):
    """Read the SceneParsing release of ADE20K with `segmentation`, indices (H, W): 0 is 'none', then 150 classes.

    root: `ADEChallengeData2016`, which holds images/ and annotations/ with training/ and validation/ in each. split:
    "train" or "validation". For the other options see `ImageDataset`.
    """

    _FOLDERS = {"train": "training", "validation": "validation"}

    def __init__(
        self,
        root: str | Path,
        size: Count | Sequence[Count],
        split: str = "train",
        key: str = "segmentation",
        **kwargs: Any,
    ) -> None:
        if split not in self._FOLDERS:
            raise UserError(f"ADE20K: split {split!r} is not one of {', '.join(self._FOLDERS)}")
        folder, name = Path(root), self._FOLDERS[split]
        super().__init__(folder / "images" / name, size, folder / "annotations" / name, key, num_classes=151, **kwargs)
