"""Metrics of single images against targets, (B, C, H, W) in [-1, 1] each: PSNR, SSIM, LPIPS.

A metric of an evaluation is called with images and their batch and returns one value an image, (B,). Functions of this
form may be named by a dotted target; `FunctionMetric` makes metrics of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.aliases import Batch
from ldm.errors import UserError
from ldm.evaluation.extractors import weights_hash
from ldm.networks.perceptual import LPIPS, MIN_SIZE

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

        SSIM = (2 m_x m_y + c1)(2 s_xy + c2) / ((m_x^2 + m_y^2 + c1)(s_x^2 + s_y^2 + c2))
    with means m, variances s^2 and covariance s_xy in Gaussian windows of 11 x 11 pixels and sigma 1.5, the mean over
    the windows inside the image and over the channels; c1 = (0.01 L)^2, c2 = (0.03 L)^2 for the range L = 2. UserError
    for smaller images. In float64, for which the windows of torchmetrics, not separated, take minutes a batch.
    """
    if min(images.shape[-2:]) < MIN_SSIM_SIDE:
        size = f"{images.shape[-2]}x{images.shape[-1]}"
        raise UserError(f"SSIM: images of {size}; it needs sides of {MIN_SSIM_SIDE} or more")
    x, y = images.double().clamp(-1, 1), targets.double()
    m_x, m_y, xx, yy, xy = _windowed(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    similarity = (2 * m_x * m_y + c1) * (2 * (xy - m_x * m_y) + c2)
    similarity /= (m_x**2 + m_y**2 + c1) * (xx - m_x**2 + yy - m_y**2 + c2)
    return similarity.mean((1, 2, 3)).float()


def _windowed(maps: Tensor) -> Tensor:
    """Return Gaussian means of maps (B, C, H, W) in windows inside them: (B, C, H - 10, W - 10)."""
    offsets = torch.arange(MIN_SSIM_SIDE, dtype=maps.dtype, device=maps.device) - MIN_SSIM_SIDE // 2
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    line = (line / line.sum()).expand(maps.shape[1], 1, 1, MIN_SSIM_SIDE)
    maps = F.conv2d(maps, line, groups=maps.shape[1])
    return F.conv2d(maps, line.mT, groups=maps.shape[1])


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
