"""Super-resolution: images with a smaller version of themselves, made during training (section 4.4, appendix D.6).

Either plain antialiased bicubic shrinking, as in the paper's comparisons, or a BSRGAN degradation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from ldm.bounds import Count
from ldm.data.core.derived import DerivedDataset
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.image_pairs.degradation import Degradation, RandomStates
from ldm.errors import UserError

__all__ = ["LowRes", "downsample"]


class LowRes(DerivedDataset):
    """Add `low_res` (C, H / factor, W / factor) in [-1, 1] to the items of any map-style data set of images.

    degradation: None for bicubic, or `bsrgan(factor)`, `bsrgan_light(factor)`. Values are those of an 8-bit file.
    Raises UserError for a degradation of another factor, and for images whose sides the factor does not divide.
    """

    stream = 2

    def __init__(self, dataset: Dataset, factor: Count = 4, degradation: Degradation | None = None) -> None:
        super().__init__(dataset)
        if factor < 1 or (degradation is not None and degradation.factor != factor):
            raise UserError(
                f"LowRes: factor {factor} must be positive, and that of the degradation "
                f"({'none' if degradation is None else degradation.factor})"
            )
        self.factor, self.degradation = factor, degradation

    def _derive(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        channels, height, width = image.shape
        if height % self.factor or width % self.factor:
            raise UserError(f"LowRes: factor {self.factor} does not divide images of {height}x{width}; change size")
        if self.degradation is None:
            return {"low_res": downsample(image, self.factor)}
        if channels != 3:
            raise UserError(f"LowRes: the degradation needs 3 channels, not {channels}; set channels: 3 or drop it")
        pixels = rearrange(to_bytes(image), "c h w -> h w c").numpy()
        degraded = self.degradation(pixels, RandomStates.seeded(int(rng.integers(2**32))))  # (H / f, W / f, 3)
        return {"low_res": from_bytes(rearrange(torch.from_numpy(degraded), "h w c -> c h w").contiguous())}


def downsample(image: Tensor, factor: int) -> Tensor:
    """Shrink (C, H, W) in [-1, 1] by antialiased bicubic interpolation, rounded to 8 bits."""
    size = [side // factor for side in image.shape[1:]]
    small = F.interpolate(image[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    return from_bytes(to_bytes(small))
