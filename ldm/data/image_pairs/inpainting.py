"""Inpainting: images with random holes, or with holes from mask files.

As in the paper (section 4.5, appendix E.2.2) the network gets the mask, and the image with -1 in the hole: `mask`
(1, H, W) is +1 in the hole and -1 where the image is known, `masked_image` is (C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.bounds import Sides
from ldm.data.core.decoding import DecodedImage
from ldm.data.core.derived import DerivedDataset
from ldm.data.core.transforms import CropParams, SampleKey
from ldm.data.image_pairs.masks import MASKS, DrawMask
from ldm.data.image_pairs.paired import TargetFolder
from ldm.data.image_pairs.paired_files import check_same_shape, crop_index_map, read_hole
from ldm.errors import UserError

__all__ = ["Masked", "MaskedFolder", "masked_image"]


class Masked(DerivedDataset):
    """Add `mask` and `masked_image` to the items of any map-style data set of images.

    masks: one of MASKS (mixed, thick, medium, thin, boxes, lama), or a callable (height, width, generator) that returns
    (H, W) bool, True in the hole. Raises UserError for another name.
    """

    stream = 1

    def __init__(self, dataset: Dataset, masks: str | DrawMask = "mixed") -> None:
        super().__init__(dataset)
        if isinstance(masks, str) and masks not in MASKS:
            raise UserError(f"Masked: masks {masks!r} is not one of {', '.join(MASKS)}")
        self.draw_mask = MASKS[masks] if isinstance(masks, str) else masks

    def _derive(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        hole = torch.from_numpy(self.draw_mask(image.shape[1], image.shape[2], rng))[None]  # (1, H, W)
        return {"mask": _signed(hole), "masked_image": masked_image(image, hole)}


class MaskedFolder(TargetFolder):
    """Read the images below `root` with `mask` and `masked_image`, from the mask files below `mask_root`.

    Which pixels are hole says `read_hole`. Masks get the crop and the flip of their image, and may have another
    resolution. Masks of another shape, and images without a mask, are skipped and logged; masks without a hole, and
    those that are all hole, are counted.

    A mask has the path of its image with any extension, and `suffix` after its stem (`a.jpg`, `a_mask.png`; both
    folders may then be one). For the other options see `ImageDataset`.
    """

    def __init__(self, root: str | Path, size: Sides, mask_root: str | Path, suffix: str = "", **kwargs: Any) -> None:
        super().__init__(size, **kwargs)
        self._index_pairs(root, mask_root, suffix)

    def __getitem__(self, index: int | SampleKey) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "masked_image": masked_image(item["image"], item["mask"] > 0)}

    def _read_target(self, file: int, path: Path, image: DecodedImage, crop: CropParams) -> dict[str, Any]:
        hole, problem = read_hole(path)
        check_same_shape(image, hole.shape[1], hole.shape[0])
        if problem is not None:
            self.errors.note_empty(file, self.names[file], f"{path}: {problem}")
        cropped = crop_index_map(hole, crop, self.transform.height, self.transform.width)
        return {"mask": _signed(torch.from_numpy(np.ascontiguousarray(cropped))[None])}


def masked_image(image: Tensor, hole: Tensor) -> Tensor:
    """Put -1 into the hole of an image: (C, H, W) in [-1, 1] and bool (1, H, W) -> (C, H, W)."""
    return image.masked_fill(hole, -1.0)


def _signed(hole: Tensor) -> Tensor:
    return hole.float() * 2 - 1
