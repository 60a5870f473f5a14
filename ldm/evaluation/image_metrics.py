"""Figures of single pictures: (images (B, 3, H, W) in [-1, 1], their batch) -> one value each, (B,).

Named on the command line, or by a dotted target of the same form; a class is made first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.clip import DEFAULT_CLIP, ClipEmbedder
from ldm.errors import UserError
from ldm.evaluation import ssim as metrics
from ldm.evaluation.extractors import weights_hash
from ldm.networks.perceptual import LPIPS, MIN_SIZE
from ldm.toy import agreement
from ldm.toy.tasks import captions_drawn

Batch = Mapping[str, Any]


def psnr(images: Tensor, batch: Batch) -> Tensor:
    """Return the peak signal-to-noise ratio to `image` in dB."""
    return agreement.psnr(images, _original(images, batch))


def ssim(images: Tensor, batch: Batch) -> Tensor:
    """Return the structural similarity to `image`."""
    return metrics.ssim(images, _original(images, batch))


def _original(images: Tensor, batch: Batch) -> Tensor:
    """Return what pictures are compared with. UserError for another size."""
    original = batch["image"]
    if original.shape[1:] != images.shape[1:]:
        sizes = " and ".join("x".join(map(str, part.shape[1:])) for part in (images, original))
        raise UserError(f"pictures and those that they are compared with differ in size: {sizes}; make them equal")
    return original


class Weighted(ABC):
    """A figure that depends on weights."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Return the SHA-256 of the weights."""


class Lpips(Weighted):
    """LPIPS (VGG16) to `image`, the paper's PSIM; smaller is nearer."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.network = torch.device(device), LPIPS().to(device)

    @cached_property
    def hash(self) -> str:
        """Return the SHA-256 of the weights."""
        black = torch.zeros(1, 3, MIN_SIZE, MIN_SIZE, device=self.device)
        self.network(black, black)  # weights are read at the first use
        return weights_hash(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare pictures."""
        return self.network(images.to(self.device), _original(images, batch).to(self.device)).flatten().cpu()


class ClipScore(Weighted):
    """100 max(cos, 0) of picture and `caption` in CLIP's space (Hessel et al. 2021, with the scale of torchmetrics)."""

    def __init__(self, version: str = DEFAULT_CLIP, device: torch.device | str = "cpu") -> None:
        self.embedder = ClipEmbedder(version, device)

    @cached_property
    def hash(self) -> str:
        """Return the SHA-256 of the weights for pictures and texts."""
        return weights_hash(self.embedder.image_model, self.embedder.text_model)

    def __call__(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare pictures and captions."""
        pictures, texts = self.embedder.embed_images(list(images)), self.embedder.embed_texts(batch["caption"])
        return 100 * (pictures * texts).sum(1).clamp(min=0).cpu()


def layout_iou(images: Tensor, batch: Batch) -> Tensor:
    """Return the overlap of asked and detected boxes of generated scenes."""
    return agreement.layout_iou(images, batch["boxes"], batch["box_labels"])


def map_iou(images: Tensor, batch: Batch) -> Tensor:
    """Return the overlap of asked and detected shapes of generated scenes."""
    return agreement.map_iou(images, batch["segmentation"])


PICTURE_METRICS: dict[str, Callable[..., Any]] = {
    "psnr": psnr,
    "ssim": ssim,
    "lpips": Lpips,
    "clip_score": ClipScore,
    "captions_drawn": captions_drawn,
    "layout_iou": layout_iou,
    "map_iou": map_iou,
}
