"""Pictures as a condition, concatenated to z_t: super-resolution, semantic maps, inpainting (section 4.3.2 - 4.5).

'No picture' is a picture of zeros of 1 x 1 pixels, which takes the size of whatever it is concatenated to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.base import Conditioner
from ldm.errors import UserError

RESCALE_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class FirstStage(Protocol):
    """What is needed of an autoencoder."""

    latent_channels: int

    def encode_mode(self, x: Tensor) -> Tensor:
        """Encode without randomness: (B, 3, H, W) -> (B, C, H/f, W/f)."""


class ImageConditioner(Conditioner):
    """Concatenate a picture as it is: (B, C, H, W), of the size of the latent."""

    def __init__(self, key: str, channels: int = 3, drop_rate: float = 0.0) -> None:
        super().__init__(key, "concat", drop_rate, trainable=False)
        self.width = self.channels = channels

    def embed(self, value: Tensor) -> Tensor:
        """Return the picture, on the device of this module."""
        return value.to(self.device)

    def null(self, n: int) -> Tensor:
        """Give pictures of zeros: (B, C, 1, 1)."""
        return self._anchor.new_zeros(n, self.channels, 1, 1)


class SpatialRescaler(Conditioner):
    """Scale a picture `num_stages` times by `multiplier`, then map its channels by a 1 x 1 convolution.

    method: one of RESCALE_METHODS as in torch's interpolate; out_channels None: no convolution. (B, in_channels, H, W)
    -> (B, out_channels, H m^n, W m^n).
    """

    def __init__(
        self,
        key: str = "segmentation",
        num_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
        drop_rate: float = 0.0,
        trainable: bool = True,
    ) -> None:
        super().__init__(key, "concat", drop_rate, trainable)
        if method not in RESCALE_METHODS:
            raise UserError(f"SpatialRescaler: method '{method}' is unknown; use one of {', '.join(RESCALE_METHODS)}")
        if num_stages < 0:
            raise UserError(f"SpatialRescaler: num_stages is {num_stages}; use 0 or more")
        self.num_stages = num_stages
        self.method = method
        self.multiplier = multiplier
        self.width = self.channels = in_channels if out_channels is None else out_channels
        if out_channels is None:
            self.channel_mapper = nn.Identity()
        else:
            self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self._settle()

    def embed(self, value: Tensor) -> Tensor:
        """Rescale a picture or a one-hot map (B, in_channels, H, W)."""
        x = value.to(self._anchor)
        for _ in range(self.num_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x)

    def null(self, n: int) -> Tensor:
        """Give pictures of zeros: (B, C, 1, 1)."""
        return self._anchor.new_zeros(n, self.channels, 1, 1)


class FirstStageConditioner(Conditioner):
    """Encode a picture by the model's own autoencoder, without randomness and without the latent scale.

    mask_key: also concatenate this mask (B, 1, H, W), resized to the latent by nearest neighbours; the published
    inpainting model has the masked picture and then its mask. The autoencoder's children appear under their own names,
    so the state dict holds them twice, as published.
    """

    def __init__(self, key: str = "masked_image", mask_key: str | None = None, drop_rate: float = 0.0) -> None:
        super().__init__(key, "concat", drop_rate, trainable=False)
        self.mask_key = mask_key
        self._owner: tuple[FirstStage, ...] = ()

    def use_first_stage(self, autoencoder: nn.Module) -> None:
        """Share the autoencoder's children. It stays the owner of its weights and of their training."""
        for name, child in autoencoder.named_children():
            self.add_module(name, child)
        self._owner = (autoencoder,)  # in a tuple: as an attribute it would be a child with keys of its own
        self.width = autoencoder.latent_channels + (self.mask_key is not None)

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
        """Give latents (and masks) of zeros: (B, C, 1, 1)."""
        self._first_stage()  # which says so if there is none yet
        return self._anchor.new_zeros(n, self.width, 1, 1)

    def _first_stage(self) -> FirstStage:
        if not self._owner:
            raise UserError("FirstStageConditioner: it has no autoencoder yet; build it as part of a LatentDiffusion")
        return self._owner[0]
