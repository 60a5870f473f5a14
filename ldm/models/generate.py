"""Draw samples from a latent diffusion model, batch by batch: z_T ~ N(0, 1), denoise, decode (section 3.2 and 3.3).

Every sample has its own seed, from which come its z_T and the noise of all its steps: it does not depend on how samples
are gathered into batches, so a run can be repeated, split or continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.base import Conditioning
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Schedule
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.sampling.base import Constrain, Noise, Sampler, SeededNoise, Step, identity, identity_constrain, keep_known

Conditions = Mapping[str, Sequence[Any] | Tensor]


class GenerativeModel(Protocol):
    """What is needed of a model; `ldm.training.latent_diffusion.LatentDiffusion` is one."""

    first_stage_model: Autoencoder | IdentityAutoencoder
    cond_stage_model: nn.Module | None
    schedule: Schedule
    device: torch.device

    def condition(self, batch: Mapping[str, Any]) -> Conditioning | None:
        """Embed the conditions of a batch."""

    def guided(self, conditioning: Conditioning | None, scale: float) -> Denoise:
        """Return the denoiser under classifier-free guidance."""

    def encode_images(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Encode images to scaled latents."""

    def decode_latents(self, z: Tensor) -> Tensor:
        """Decode scaled latents to images."""


@dataclass(frozen=True, eq=False)
class Known:
    """Hold what is known of each picture, for a model that was not trained to fill holes.

    images (N, C, H, W) in [-1, 1]; mask (N, 1, H, W), above 0 where there is a hole. Latents of which no pixel is in
    the hole are held at the noised known ones at every step (`keep_known`); at the last they are nearly, not exactly,
    those of the picture.
    """

    images: Tensor
    mask: Tensor

    def __getitem__(self, part: slice) -> Known:
        """Pick pictures."""
        return Known(self.images[part], self.mask[part])


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Request:
    """Say what to draw: one sample per seed, of size (height, width).

    conditions: batch key -> one entry per sample, as the data set would give them (texts, labels, pictures); scale: of
    classifier-free guidance, 1 is none; autocast: half-precision dtype for the network (decoding stays float32); known:
    the parts to keep, if any.
    """

    seeds: Sequence[int]
    size: tuple[int, int]
    conditions: Conditions = field(default_factory=dict)
    scale: float = 1.0
    batch_size: int = 4
    autocast: torch.dtype | None = None
    known: Known | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"generate: batch_size is {self.batch_size}; use 1 or more")
        for key, entries in self.conditions.items():
            if len(entries) != len(self.seeds):
                raise UserError(f"generate: {len(entries)} of '{key}' for {len(self.seeds)} samples; give one for each")

    def batches(self) -> Iterator[tuple[int, list[int], dict[str, Any]]]:
        """Yield the position of the first sample, the seeds, and the conditions of each batch."""
        for first in range(0, len(self.seeds), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield first, list(self.seeds[part]), {key: entries[part] for key, entries in self.conditions.items()}


@dataclass(frozen=True, eq=False)
class Generated:
    """Hold images (B, C, H, W), about in [-1, 1], with their seeds and the position of the first in the request."""

    images: Tensor
    seeds: list[int]
    first: int


def generate(
    model: GenerativeModel,
    sampler: Sampler,
    request: Request,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Iterator[Generated]:
    """Draw the samples of a request with the weights that `model` has now; `on_step` sees every step of every batch.

    UserError, at the call, for a size that the autoencoder cannot make; at the first batch for what the sampler or the
    conditioner refuses; and for samples that are not finite.
    """
    model.first_stage_model.latent_shape(*request.size)
    return (
        Generated(_draw(model, sampler, request, first, seeds, conditions, on_step), seeds, first)
        for first, seeds, conditions in request.batches()
    )


@torch.no_grad()
def _draw(
    model: GenerativeModel,
    sampler: Sampler,
    request: Request,
    first: int,
    seeds: list[int],
    conditions: dict[str, Any],
    on_step: Callable[[Step], None],
) -> Tensor:
    noise = SeededNoise(seeds, model.device)
    z = noise((len(seeds), *model.first_stage_model.latent_shape(*request.size)))  # (B, c, h, w)
    refine = _clamp_to_pixels if isinstance(model.first_stage_model, IdentityAutoencoder) else identity
    known = None if request.known is None else request.known[first : first + len(seeds)]
    half = nullcontext() if request.autocast is None else torch.autocast(model.device.type, request.autocast)
    with half:
        constrain = identity_constrain if known is None else _keeping(model, known, noise)
        denoise = model.guided(model.condition(conditions), request.scale)
        for step in sampler(denoise, z, model.schedule, refine=refine, constrain=constrain, noise=noise):
            on_step(step)
            z = step.x
    images = model.decode_latents(z.float())  # (B, C, H, W)
    if not torch.isfinite(images).all():
        raise UserError("generate: the samples are not finite numbers; use precision 32, or check the weights")
    return images


def _keeping(model: GenerativeModel, known: Known, noise: Noise) -> Constrain:
    """Hold the latents of which every pixel is known. Holes are grey when they are encoded."""
    mask = known.mask.to(model.device)
    z = model.encode_images(known.images.to(model.device) * (mask <= 0), noise).float()  # (B, c, h, w)
    is_known = F.adaptive_max_pool2d(mask, z.shape[2:]) <= 0  # (B, 1, h, w)
    return keep_known(z, is_known.to(z.dtype), model.schedule, noise)


def _clamp_to_pixels(x0: Tensor) -> Tensor:
    return x0.clamp(-1, 1)
