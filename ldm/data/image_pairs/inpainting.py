"""Inpainting: pictures with holes that are drawn on the fly, or read from mask files.

As in the paper (section 4.5, appendix E.2.2) the network gets the picture with its hole at -1, and the mask:
`mask` (1, H, W) is +1 in the hole and -1 where the picture is known, `masked_image` (C, H, W) is the picture there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.bounds import Count
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import Picture
from ldm.data.core.derived import DerivedDataset
from ldm.data.core.transforms import Draw, View
from ldm.data.image_pairs.masks import MASKS, DrawMask
from ldm.data.image_pairs.partners import find_pairs, insist_on_same_shape, naming, seen_indices
from ldm.data.readers.folders import existing_folder
from ldm.errors import UserError

__all__ = ["Masked", "MaskedFolder", "masked_image"]

_LOSSY_THRESHOLD = 127  # JPEG leaves traces around zero


class Masked(DerivedDataset):
    """Add `mask` and `masked_image` to the items of any map-style data set of pictures.

    masks: one of MASKS (mixed, thick, medium, thin, boxes, lama), or an object that is called with height,
    width and a generator and gives (H, W) bool, True = hole. Raises UserError for another name.
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


class MaskedFolder(ImageDataset):
    """Read the pictures below `root` with `mask` and `masked_image` from the mask files below `mask_root`.

    A mask has the path of its picture, and `suffix` after its stem (`a.jpg`, `a_mask.png`; the two may share a folder).
    What is not zero is hole (in JPEG files: above the middle grey). It gets the crop and the mirroring of the picture,
    after resizing by nearest neighbours if it has the same shape in another size; a mask of another shape is skipped
    and named, as are pictures without a mask. Masks without a hole are counted, and the first is named. For the other
    options see `ImageDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Count | Sequence[Count],
        mask_root: str | Path,
        suffix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.root = existing_folder(root)
        masks = find_pairs(self.root, mask_root, suffix)
        self._index(masks, str(root))
        self._masks = [masks[name] for name in self.names]

    def __getitem__(self, index: int | Draw) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "masked_image": masked_image(item["image"], item["mask"] > 0)}

    def _read_image(self, file: int) -> Picture:
        return self.transform.open(self.root / self.names[file])

    def _read_seen_fields(self, file: int, image: Picture, view: View, rng: np.random.Generator) -> dict[str, Any]:
        path = self._masks[file]
        with naming(path):
            hole = _read_hole(path)
            insist_on_same_shape(image, hole.shape[1], hole.shape[0])
        if not hole.any():
            self.tally.note_empty(file, self.names[file], f"{path} has no hole; such pictures train nothing to fill in")
        seen = seen_indices(hole, view, self.transform.height, self.transform.width)
        return {"mask": _signed(torch.from_numpy(np.ascontiguousarray(seen))[None])}


def masked_image(image: Tensor, hole: Tensor) -> Tensor:
    """Put -1 into the hole of a picture: (C, H, W) in [-1, 1] and bool (1, H, W) -> (C, H, W)."""
    return image.masked_fill(hole, -1.0)


def _signed(hole: Tensor) -> Tensor:
    return hole.float() * 2 - 1


def _read_hole(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        opened.load()
        if opened.format in ("JPEG", "MPO"):
            return np.asarray(opened.convert("L")) > _LOSSY_THRESHOLD
        values = np.asarray(opened.convert("RGB") if opened.mode in ("RGBA", "LA", "PA") else opened)
    return values.any(axis=2) if values.ndim == 3 else values != 0
