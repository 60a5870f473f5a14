"""Images as a condition, concatenated to z_t: super-resolution, semantic maps, inpainting (section 4.3.2 - 4.5).

'No image' is an image of zeros of 1 x 1 pixels, expanded to the size of what it is concatenated to.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.aliases import Batch
from ldm.bounds import Depth, Fraction, Size
from ldm.conditioning.base import Conditioner, InputSpec
from ldm.errors import UserError
from ldm.transfer import sent

RESCALE_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class FirstStage(Protocol):
    """What FirstStageConditioner needs of an autoencoder."""

    in_channels: int
    latent_channels: int

    def encode_mode(self, x: Tensor) -> Tensor:
        """Return latents without randomness: (B, in_channels, H, W) -> (B, C, H/f, W/f)."""


def planes(value: Tensor, num_classes: int) -> Tensor:
    """Return index maps, integers (B, H, W), one-hot as float32 (B, num_classes, H, W); floating images unchanged.

    Negative indices are 0 in every plane. UserError for indices from num_classes on if they are on the CPU; checking
    them on another device would wait for it, and scatter refuses them there.
    """
    if value.is_floating_point():
        return value
    if value.device.type == "cpu" and (highest := int(value.max())) >= num_classes:
        raise UserError(f"conditioning: a map has class {highest}; this model has classes 0 to {num_classes - 1}")
    index = value.long().unsqueeze(1)  # (B, 1, H, W)
    empty = torch.zeros(index.shape[0], num_classes, *index.shape[2:], device=value.device)
    return empty.scatter_(1, index.clamp(min=0), (index >= 0).float())


class ImageConditioner(Conditioner):
    """Concatenate an image (B, C, H, W), or an index map as planes (see `planes`), of the size of the latent."""

    def __init__(self, key: str, channels: Size = 3, drop_rate: Fraction = 0.0) -> None:
        super().__init__(key, "concat", drop_rate, trainable=False)
        self.width = self.channels = self.in_channels = channels

    def input_specs(self) -> dict[str, InputSpec]:
        """Return that images have in_channels channels, and index maps as many classes."""
        return {self.key: InputSpec(self.in_channels, channels=self.in_channels)}

    def embed(self, value: Tensor) -> Tensor:
        """Return the image (B, C, H, W) on the device of this module."""
        return planes(sent(value, self.device), self.channels)

    def null(self, n: int) -> Tensor:
        """Return images of zeros: (n, C, 1, 1)."""
        return self._device_buffer.new_zeros(n, self.channels, 1, 1)


class SpatialRescaler(Conditioner):
    """Scale an image `num_stages` = n times by `multiplier` = m, then map its channels by a 1 x 1 convolution.

    (B, in_channels, H, W) -> (B, out_channels, H m^n, W m^n); index maps become in_channels planes (see `planes`).
    method: one of RESCALE_METHODS, as in torch's interpolate; out_channels None: no convolution.
    """

    def __init__(
        self,
        key: str = "segmentation",
        num_stages: Depth = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: Size = 3,
        out_channels: Size | None = None,
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
        self._freeze_unless_trainable()

    def input_specs(self) -> dict[str, InputSpec]:
        """Return that images have in_channels channels, and index maps as many classes."""
        return {self.key: InputSpec(self.in_channels, channels=self.in_channels)}

    def embed(self, value: Tensor) -> Tensor:
        """Return the rescaled image (B, in_channels, H, W) or index map (B, H, W)."""
        x = planes(sent(value, self.device), self.in_channels).to(self._device_buffer.dtype)
        for _ in range(self.num_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return self.channel_mapper(x)

    def null(self, n: int) -> Tensor:
        """Return images of zeros: (n, C, 1, 1)."""
        return self._device_buffer.new_zeros(n, self.channels, 1, 1)


class InpaintingConditioner(Conditioner):
    """Concatenate a mask, 1 in the hole, and the scaled latent of the image, grey there (as Stable Diffusion does).

    Read are an image (B, C, H, W) and a mask (B, 1, H, W), above 0 in the hole. It is kept in guidance, and 'no
    condition' is zeros. latent_scale: that of the model.
    """

    is_kept = True

    def __init__(
        self,
        key: str = "masked_image",
        mask_key: str = "mask",
        latent_scale: float = 1.0,
        drop_rate: Fraction = 0.0,
    ) -> None:
        super().__init__(key, "concat", drop_rate, trainable=False)
        self.mask_key, self.latent_scale = mask_key, latent_scale
        self._owner: tuple[FirstStage, ...] = ()  # in a tuple: an attribute would be a child

    def use_first_stage(self, autoencoder: nn.Module) -> None:
        """Receive the model's autoencoder."""
        self._owner = (autoencoder,)
        self.width = autoencoder.latent_channels + 1

    def input_specs(self) -> dict[str, InputSpec]:
        """Return the channels of the autoencoder's images, once it is known, and of the mask."""
        channels = self._owner[0].in_channels if self._owner else None
        return {self.key: InputSpec(channels=channels), self.mask_key: InputSpec(channels=1)}

    def value(self, batch: Batch) -> list[Tensor]:
        """Return the image and the mask."""
        return [self._entry(batch, key) for key in (self.key, self.mask_key)]

    def embed(self, value: list[Tensor]) -> Tensor:
        """Return [image (B, 3, H, W), mask (B, 1, H, W)] encoded: (B, 1 + C, H/f, W/f)."""
        image, mask = (tensor.to(self._device_buffer) for tensor in value)
        hole = (mask > 0).to(image)
        latent = self.latent_scale * _known(self._owner, self).encode_mode(image * (1 - hole))
        return torch.cat([F.interpolate(hole, size=latent.shape[2:]), latent], dim=1)

    def null(self, n: int) -> Tensor:
        """Return zeros: (n, 1 + C, 1, 1)."""
        _known(self._owner, self)
        return self._device_buffer.new_zeros(n, self.width, 1, 1)


class FirstStageConditioner(Conditioner):
    """Encode an image by the model's own autoencoder, without randomness and without the latent scale.

    mask_key: also concatenate this mask (B, 1, H, W), resized to the latent by nearest neighbours, as the published
    inpainting model does. The autoencoder's children are also children of this module, so that the state dict holds
    them under two names, as published.
    """

    def __init__(self, key: str = "masked_image", mask_key: str | None = None, drop_rate: Fraction = 0.0) -> None:
        super().__init__(key, "concat", drop_rate, trainable=False)
        self.mask_key = mask_key
        self._owner: tuple[FirstStage, ...] = ()

    def use_first_stage(self, autoencoder: nn.Module) -> None:
        """Share the children of the model's autoencoder, whose training stays its own."""
        for name, child in autoencoder.named_children():
            self.add_module(name, child)
        self._owner = (autoencoder,)  # in a tuple: an attribute would be a child under a third name
        self.width = autoencoder.latent_channels + (self.mask_key is not None)

    def input_specs(self) -> dict[str, InputSpec]:
        """Return the channels of the autoencoder's images, once it is known, and of the mask."""
        images = InputSpec(channels=self._owner[0].in_channels if self._owner else None)
        masks = {} if self.mask_key is None else {self.mask_key: InputSpec(channels=1)}
        return {self.key: images, **masks}

    def value(self, batch: Batch) -> list[Tensor]:
        """Return the image and, with mask_key, the mask."""
        keys = [self.key] if self.mask_key is None else [self.key, self.mask_key]
        return [self._entry(batch, key) for key in keys]

    def embed(self, value: list[Tensor]) -> Tensor:
        """Return [image (B, 3, H, W), mask (B, 1, H, W) if any] encoded: (B, C, H/f, W/f)."""
        image, *masks = (tensor.to(self._device_buffer) for tensor in value)
        latent = _known(self._owner, self).encode_mode(image)
        return torch.cat([latent, *(F.interpolate(mask, size=latent.shape[2:]) for mask in masks)], dim=1)

    def null(self, n: int) -> Tensor:
        """Return latents (and masks) of zeros: (n, C, 1, 1)."""
        _known(self._owner, self)
        return self._device_buffer.new_zeros(n, self.width, 1, 1)


def _known(owner: tuple[FirstStage, ...], conditioner: Conditioner) -> FirstStage:
    """Return the autoencoder that a conditioner has received. UserError if there is none yet."""
    if not owner:
        name = type(conditioner).__name__
        raise UserError(f"{name}: it has no autoencoder yet; build it as part of a LatentDiffusion")
    return owner[0]
