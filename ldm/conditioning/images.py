"""Pictures as a condition, concatenated to z_t: super-resolution, semantic maps, inpainting (section 4.3.2 - 4.5).

'No picture' is a picture of zeros of 1 x 1 pixels, which takes the size of whatever it is concatenated to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.bounds import Count, Fraction, Natural
from ldm.conditioning.base import Conditioner, Taken
from ldm.errors import UserError

RESCALE_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class FirstStage(Protocol):
    """What is needed of an autoencoder."""

    in_channels: int
    latent_channels: int

    def encode_mode(self, x: Tensor) -> Tensor:
        """Encode without randomness: (B, 3, H, W) -> (B, C, H/f, W/f)."""


def planes(value: Tensor, num_classes: int) -> Tensor:
    """Turn maps of class indices, integers (B, H, W), into float32 planes (B, num_classes, H, W) of 0 and 1.

    Indices below 0 are in no plane. Floating pictures (B, C, H, W) stay as they are. UserError for larger indices on
    the CPU; on other devices, which would have to be waited for, scatter refuses them.
    """
    if value.is_floating_point():
        return value
    if value.device.type == "cpu" and (highest := int(value.max())) >= num_classes:
        raise UserError(f"conditioning: a map has class {highest}; this model has classes 0 to {num_classes - 1}")
    index = value.long().unsqueeze(1)  # (B, 1, H, W)
    empty = torch.zeros(index.shape[0], num_classes, *index.shape[2:], device=value.device)
    return empty.scatter_(1, index.clamp(min=0), (index >= 0).float())


class ImageConditioner(Conditioner):
    """Concatenate a picture (B, C, H, W), or the planes of an index map (see `planes`), of the size of the latent."""

    def __init__(self, key: str, channels: Count = 3, drop_rate: Fraction = 0.0) -> None:
        super().__init__(key, "concat", drop_rate, trainable=False)
        self.width = self.channels = self.in_channels = channels

    def takes(self) -> dict[str, Taken]:
        """Take pictures of these channels, or as many classes."""
        return {self.key: Taken(self.in_channels, channels=self.in_channels)}

    def embed(self, value: Tensor) -> Tensor:
        """Return the picture, on the device of this module."""
        return planes(value.to(self.device), self.channels)

    def null(self, n: int) -> Tensor:
        """Return pictures of zeros: (B, C, 1, 1)."""
        return self._anchor.new_zeros(n, self.channels, 1, 1)


class SpatialRescaler(Conditioner):
    """Scale a picture `num_stages` times by `multiplier`, then map its channels by a 1 x 1 convolution.

    method: one of RESCALE_METHODS as in torch's interpolate; out_channels None: no convolution. (B, in_channels, H, W)
    -> (B, out_channels, H m^n, W m^n). Index maps become in_channels planes (see `planes`).
    """

    def __init__(
        self,
        key: str = "segmentation",
        num_stages: Natural = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: Count = 3,
        out_channels: Count | None = None,
        bias: bool = False,
        drop_rate: Fraction = 0.0,
        trainable: bool = True,
    ) -> None:
        super().__init__(key, "concat", drop_rate, trainable)
        if method not in RESCALE_METHODS:
            raise UserError(f"SpatialRescaler: method '{method}' is unknown; use one of {', '.join(RESCALE_METHODS)}")
        if num_stages < 0:
            raise UserError(f"SpatialRescaler: num_stages is {num_stages}; use 0 or more")
        self.num_stages = num_stages
        self.in_channels = in_channels
        self.method = method
        self.multiplier = multiplier
        self.width = self.channels = in_channels if out_channels is None else out_channels
        if out_channels is None:
            self.channel_mapper = nn.Identity()
        else:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self._settle()

    def takes(self) -> dict[str, Taken]:
        """Take pictures of these channels, or as many classes."""
        return {self.key: Taken(self.in_channels, channels=self.in_channels)}

    def embed(self, value: Tensor) -> Tensor:
        """Rescale a picture (B, in_channels, H, W) or an index map (B, H, W)."""
        x = planes(value.to(self.device), self.in_channels).to(self._anchor.dtype)
        for _ in range(self.num_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x)

    def null(self, n: int) -> Tensor:
        """Return pictures of zeros: (B, C, 1, 1)."""
        return self._anchor.new_zeros(n, self.channels, 1, 1)


class FirstStageConditioner(Conditioner):
    """Encode a picture by the model's own autoencoder, without randomness and without the latent scale.

    mask_key: also concatenate this mask (B, 1, H, W), resized to the latent by nearest neighbours; the published
    inpainting model has the masked picture and then its mask. The autoencoder's children appear under their own names,
    so the state dict holds them twice, as published.
    """

    def __init__(self, key: str = "masked_image", mask_key: str | None = None, drop_rate: Fraction = 0.0) -> None:
        super().__init__(key, "concat", drop_rate, trainable=False)
        self.mask_key = mask_key
        self._owner: tuple[FirstStage, ...] = ()

    def use_first_stage(self, autoencoder: nn.Module) -> None:
        """Share the autoencoder's children. It stays the owner of its weights and of their training."""
        for name, child in autoencoder.named_children():
            self.add_module(name, child)
        self._owner = (autoencoder,)  # in a tuple: as an attribute it would be a child with keys of its own
        self.width = autoencoder.latent_channels + (self.mask_key is not None)

    def takes(self) -> dict[str, Taken]:
        """Take pictures as the autoencoder does, once there is one, and a mask."""
        pictures = Taken(channels=self._owner[0].in_channels if self._owner else None)
        masks = {} if self.mask_key is None else {self.mask_key: Taken(channels=1)}
        return {self.key: pictures, **masks}

    def value(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Take the picture and, if there is one, the mask."""
        keys = [self.key] if self.mask_key is None else [self.key, self.mask_key]
        return [self._entry(batch, key) for key in keys]

    def embed(self, value: list[Tensor]) -> Tensor:
        """Encode [picture (B, 3, H, W), mask (B, 1, H, W) if any]: (B, C, H/f, W/f)."""
        picture, *masks = (tensor.to(self._anchor) for tensor in value)
        latent = self._first_stage().encode_mode(picture)
        return torch.cat([latent, *(F.interpolate(mask, size=latent.shape[2:]) for mask in masks)], dim=1)

    def null(self, n: int) -> Tensor:
        """Return latents (and masks) of zeros: (B, C, 1, 1)."""
        self._first_stage()  # which says so if there is none yet
        return self._anchor.new_zeros(n, self.width, 1, 1)

    def _first_stage(self) -> FirstStage:
        if not self._owner:
            raise UserError("FirstStageConditioner: it has no autoencoder yet; build it as part of a LatentDiffusion")
        return self._owner[0]
