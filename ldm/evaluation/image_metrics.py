"""Metrics of single images against targets, (B, C, H, W) in [-1, 1] each: PSNR, SSIM, LPIPS.

A metric of an evaluation is called with images and their batch and returns one value an image, (B,). Functions of this
form may be named by a dotted target; `FunctionMetric` makes metrics of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.aliases import Batch
from ldm.errors import UserError
from ldm.evaluation.extractors import weights_hash
from ldm.networks.perceptual import LPIPS, MIN_SIZE

_log = logging.getLogger(__name__)
MIN_SSIM_SIDE = 11  # of SSIM's window


@runtime_checkable
class Metric(Protocol):
    """What all metrics have in common; see `DistributionMetric` and `ImageMetric` for what they are called with."""

    def settings(self) -> dict[str, Any]:
        """Return what values depend on: options, or the SHA-256 of weights."""


class ImageMetric(Metric, Protocol):
    """A metric of single images."""

    def __call__(self, images: Tensor, batch: Batch) -> Tensor:
        """Return a value for each image, (B,)."""


@dataclass(frozen=True)
class FunctionMetric:
    """A metric from a function of images and their batch, which depends on nothing else."""

    function: Callable[[Tensor, Batch], Tensor]

    def settings(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def __call__(self, images: Tensor, batch: Batch) -> Tensor:
        """Return a value for each image, (B,)."""
        return self.function(images, batch)


def psnr(images: Tensor, targets: Tensor, where: Tensor | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (B,); clamps the images. where (B, 1, H, W) > 0: only there."""
    squares = (images.float().clamp(-1, 1) - targets).square()  # (B, C, H, W)
    if where is None:
        error = squares.flatten(1).mean(1)
    else:
        weight = (where > 0).float()
        error = (squares.mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004, eq. 13), 1 for equal images, (B,); clamps the images.

    That of torchmetrics for the range 2, but of the Gaussian windows inside the image alone: 11 x 11 pixels, sigma 1.5.
    UserError for smaller images.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # imports lightning_utilities

    if min(images.shape[-2:]) < MIN_SSIM_SIDE:
        size = f"{images.shape[-2]}x{images.shape[-1]}"
        raise UserError(f"SSIM: images of {size}; it needs sides of {MIN_SSIM_SIDE} or more")
    options = {"data_range": 2.0, "reduction": "none", "return_full_image": True}
    _, full = structural_similarity_index_measure(images.float().clamp(-1, 1), targets.float(), **options)
    margin = MIN_SSIM_SIDE // 2
    return full[..., margin:-margin, margin:-margin].mean((1, 2, 3))  # over positions and channels


def available_metrics(device: torch.device) -> dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]]:
    """Return the smallest side of each metric against targets, and the metric; LPIPS if its weights are here."""
    metrics: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
        "psnr": (1, psnr),
        "ssim": (MIN_SSIM_SIDE, ssim),
    }
    lpips, probe = LPIPS().to(device), torch.zeros(1, 3, MIN_SIZE, MIN_SIZE, device=device)
    try:
        lpips(probe, probe)
    except UserError as error:
        _log.warning("LPIPS is left out: %s", error)
        return metrics
    return {**metrics, "lpips": (MIN_SIZE, lpips)}


def psnr_to_target(images: Tensor, batch: Batch) -> Tensor:
    """Return the PSNR to `image` of the batch, (B,)."""
    return psnr(images, _target(images, batch))


def ssim_to_target(images: Tensor, batch: Batch) -> Tensor:
    """Return the SSIM to `image` of the batch, (B,)."""
    return ssim(images, _target(images, batch))


class Lpips:
    """LPIPS (VGG16) to `image` of the batch, the paper's PSIM; smaller is nearer."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.network = torch.device(device), LPIPS().to(device)

    @cached_property
    def _hash(self) -> str:
        black = torch.zeros(1, 3, MIN_SIZE, MIN_SIZE, device=self.device)
        self.network(black, black)  # weights are read at the first use
        return weights_hash(self.network)

    def settings(self) -> dict[str, Any]:
        """Return the SHA-256 of the weights."""
        return {"sha256": self._hash}

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the distance of each image to its target, (B,)."""
        return self.network(images.to(self.device), _target(images, batch).to(self.device)).flatten().cpu()


def _target(images: Tensor, batch: Batch) -> Tensor:
    target = batch["image"]
    if target.shape[1:] != images.shape[1:]:
        sizes = " and ".join("x".join(map(str, part.shape[1:])) for part in (images, target))
        raise UserError(f"images and their targets differ in size: {sizes}; make them equal")
    return target
