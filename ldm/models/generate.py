"""Draw samples from a latent diffusion model, batch by batch: noise, denoise, decode (sections 3.2 and 3.3).

Every sample has its own seed, from which come its first noise and that of all its steps: it does not depend on how
samples are gathered into batches, so a run can be repeated, split or continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.inpainting import InpaintingTarget, inpainting_constraint
from ldm.sampling.base import Sampler, SeededNoise, Step, identity, identity_constrain

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion

Conditions = Mapping[str, Sequence[Any] | Tensor]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Request:
    """Which images to draw: one for each seed, of size (height, width) in pixels.

    Args:
        seeds: One for each image.
        size: (height, width).
        conditions: Batch key -> one entry for each image, as the data set would give them (texts, labels, images).
        guidance: Scale of classifier-free guidance; 1 is none.
        batch_size: Images drawn at a time.
        autocast: Half-precision dtype of the network, if any; decoding stays float32.
        target: Images to fill, for a model that was not trained to fill holes.
    """

    seeds: Sequence[int]
    size: tuple[int, int]
    conditions: Conditions = field(default_factory=dict)
    guidance: float = 1.0
    batch_size: int = 4
    autocast: torch.dtype | None = None
    target: InpaintingTarget | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"generate: batch_size is {self.batch_size}; use 1 or more")
        for seed in (min(self.seeds, default=0), max(self.seeds, default=0)):
            if not 0 <= seed < 2**64:
                raise UserError(f"generate: seed {seed} is no whole number from 0 to 2^64 - 1")
        for key, entries in self.conditions.items():
            if len(entries) != len(self.seeds):
                raise UserError(f"generate: {len(entries)} of '{key}' for {len(self.seeds)} samples; give one for each")

    def batches(self) -> Iterator[Request]:
        """Yield the parts of `batch_size` images."""
        for first in range(0, len(self.seeds), self.batch_size):
            part = slice(first, first + self.batch_size)
            conditions = {key: entries[part] for key, entries in self.conditions.items()}
            target = None if self.target is None else self.target[part]
            yield replace(self, seeds=list(self.seeds[part]), conditions=conditions, target=target)


@torch.no_grad()
def generate(
    model: LatentDiffusion,
    sampler: Sampler,
    request: Request,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Iterator[Tensor]:
    """Yield the images of each batch of a request in turn: (B, C, H, W), about in [-1, 1].

    The weights are those that `model` has now; `on_step` receives every step of every batch. UserError for a size that
    the autoencoder cannot make, for what the sampler or the conditioner refuses, and for samples that are not finite.
    """
    process, shape = model.process, model.first_stage_model.latent_shape(*request.size)
    refine = clamp_to_pixels if isinstance(model.first_stage_model, IdentityAutoencoder) else identity
    for batch in request.batches():
        noise = SeededNoise(batch.seeds, model.device)
        z = noise((len(batch.seeds), *shape))  # (B, c, h, w)
        if process.prior_std != 1:
            z = process.prior_std * z
        with nullcontext() if batch.autocast is None else torch.autocast(model.device.type, batch.autocast):
            constrain = identity_constrain
            if batch.target is not None:
                constrain = inpainting_constraint(model, batch.target, noise)
            denoise = model.denoiser(model.condition(batch.conditions), batch.guidance)
            for step in sampler(denoise, z, process, refine=refine, constrain=constrain, noise=noise):
                on_step(step)
                z = step.x
        images = model.decode(z.float())  # (B, C, H, W)
        if not torch.isfinite(images).all():
            raise UserError("generate: the samples are not finite numbers; use precision 32, or check the weights")
        yield images


def clamp_to_pixels(x0: Tensor) -> Tensor:
    """Clamp predicted images to [-1, 1], for diffusion on pixels."""
    return x0.clamp(-1, 1)
