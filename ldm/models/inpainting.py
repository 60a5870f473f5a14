"""Inpainting with a model that was not trained to fill holes: known latents replace the samples' at every step.

The replacement method of Song et al. (arXiv 2011.13456, appendix I.2) and RePaint, on latents: before each step the
latents of which no pixel lies in the hole are those of the known image, with the noise of that time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ldm.sampling.base import Constrain, Noise, keep_known

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion


@dataclass(frozen=True, eq=False)
class InpaintingTarget:
    """Images to fill, (N, C, H, W) in [-1, 1], and their masks (N, 1, H, W), above 0 in the hole."""

    images: Tensor
    mask: Tensor

    def __getitem__(self, part: slice) -> InpaintingTarget:
        """Return some of the images."""
        return InpaintingTarget(self.images[part], self.mask[part])


def inpainting_constraint(model: LatentDiffusion, target: InpaintingTarget, noise: Noise) -> Constrain:
    """Keep the latents of which every pixel is known. Holes are grey when they are encoded.

    At the end these latents are nearly, not exactly, those of the image.
    """
    mask = target.mask.to(model.device)
    z = model.encode(target.images.to(model.device) * (mask <= 0), noise).float()  # (B, c, h, w)
    is_known = F.adaptive_max_pool2d(mask, z.shape[2:]) <= 0  # (B, 1, h, w)
    return keep_known(z, is_known.to(z.dtype), model.process, noise)
