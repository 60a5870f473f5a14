"""Draw samples from a latent diffusion model, batch by batch: noise, denoise, decode (sections 3.2 and 3.3).

Every sample has its own seed, from which come its first noise and that of all its steps: it does not depend on how
samples are gathered into batches, so a run can be repeated, split or continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.inpainting import Known, inpainting_constraint
from ldm.sampling.base import Sampler, SeededNoise, Step, identity, identity_constrain

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion

Conditions = Mapping[str, Sequence[Any] | Tensor]


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
    model: LatentDiffusion,
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
    model: LatentDiffusion,
    sampler: Sampler,
    request: Request,
    first: int,
    seeds: list[int],
    conditions: dict[str, Any],
    on_step: Callable[[Step], None],
) -> Tensor:
    process, noise = model.process, SeededNoise(seeds, model.device)
    z = noise((len(seeds), *model.first_stage_model.latent_shape(*request.size)))  # (B, c, h, w)
    if process.prior_std != 1:
        z = process.prior_std * z
    refine = clamp_to_pixels if isinstance(model.first_stage_model, IdentityAutoencoder) else identity
    known = None if request.known is None else request.known[first : first + len(seeds)]
    half = nullcontext() if request.autocast is None else torch.autocast(model.device.type, request.autocast)
    with half:
        constrain = identity_constrain if known is None else inpainting_constraint(model, known, noise)
        denoise = model.denoiser(model.condition(conditions), request.scale)
        for step in sampler(denoise, z, process, refine=refine, constrain=constrain, noise=noise):
            on_step(step)
            z = step.x
    images = model.decode(z.float())  # (B, C, H, W)
    if not torch.isfinite(images).all():
        raise UserError("generate: the samples are not finite numbers; use precision 32, or check the weights")
    return images


def clamp_to_pixels(x0: Tensor) -> Tensor:
    """Clamp predicted images to [-1, 1], for diffusion on pixels."""
    return x0.clamp(-1, 1)
