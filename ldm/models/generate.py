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

from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.graphs import graphed
from ldm.models.guidance import Guidance
from ldm.sampling.base import Sampler, SeededNoise, Step, identity, identity_constrain, times_like

if TYPE_CHECKING:
    from ldm.models.inpainting import InpaintingTarget
    from ldm.models.latent_diffusion import LatentDiffusion

Conditions = Mapping[str, Sequence[Any] | Tensor]


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Request:
    """Which images to draw: one for each seed, of size (height, width) in pixels.

    Args:
        seeds: One for each image.
        size: (height, width).
        conditions: Batch key -> one entry for each image, as the data set would give them (texts, labels, images).
        guidance: Scale of classifier-free guidance (1 is none), or any `Guidance`.
        batch_size: Images drawn at a time.
        autocast: Half-precision dtype of the network, if any; decoding stays float32.
        target: Images to fill, for a model that was not trained to fill holes.
        images: (N, C, H, W) in [-1, 1] to start from instead of from noise, at the first time of the sampler.
        negative: Like `conditions`, to be guided away from.
        graphs: Record and replay the calls of the network on devices that can (see `ldm.models.graphs`).
    """

    seeds: Sequence[int]
    size: tuple[int, int]
    conditions: Conditions = field(default_factory=dict)
    guidance: Guidance | float = 1.0
    batch_size: int = 4
    autocast: torch.dtype | None = None
    target: InpaintingTarget | None = None
    images: Tensor | None = None
    negative: Conditions | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"generate: batch_size is {self.batch_size}; use 1 or more")
        for seed in (min(self.seeds, default=0), max(self.seeds, default=0)):
            if not 0 <= seed < 2**64:
                raise UserError(f"generate: seed {seed} is no whole number from 0 to 2^64 - 1")
        columns = [*self.conditions.items(), *(self.negative or {}).items()]
        columns += [] if self.images is None else [("images", self.images)]
        for key, entries in columns:
            if len(entries) != len(self.seeds):
                raise UserError(f"generate: {len(entries)} of '{key}' for {len(self.seeds)} samples; give one for each")

    def batches(self) -> Iterator[Request]:
        """Yield the parts of `batch_size` images."""
        for first in range(0, len(self.seeds), self.batch_size):
            part = slice(first, first + self.batch_size)
            conditions, negative = (
                None if columns is None else {key: entries[part] for key, entries in columns.items()}
                for columns in (self.conditions, self.negative)
            )
            target, images = (None if whole is None else whole[part] for whole in (self.target, self.images))
            yield replace(
                self, seeds=list(self.seeds[part]), conditions=conditions, negative=negative, target=target,
                images=images,
            )  # fmt: skip


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
    guidance = Guidance.of(request.guidance).ready(model, request.negative is not None)
    if request.negative is None:
        request = replace(request, negative=guidance.away_from(model, len(request.seeds)))
    refine = clamp_to_pixels if isinstance(model.first_stage_model, IdentityAutoencoder) else identity
    for batch in request.batches():
        noise = SeededNoise(batch.seeds, model.device)
        z = _start(model, sampler, batch, noise, shape)  # (B, c, h, w)
        with nullcontext() if batch.autocast is None else torch.autocast(model.device.type, batch.autocast):
            constrain = identity_constrain
            if batch.target is not None:
                from ldm.models.inpainting import inpainting_constraint  # of a task that few models have

                constrain = inpainting_constraint(model, batch.target, noise)
            conditions = {**model.entries_for(request.size, len(batch.seeds)), **batch.conditions}
            denoise = _denoiser(model, batch, conditions, guidance)
            for step in sampler(denoise, z, process, refine=refine, constrain=constrain, noise=noise):
                on_step(step)
                z = step.x
        images = model.decode(z.float())  # (B, C, H, W)
        if not torch.isfinite(images).all():
            raise UserError("generate: the samples are not finite numbers; use precision 32, or check the weights")
        yield images


def _denoiser(model: LatentDiffusion, batch: Request, conditions: Conditions, guidance: Guidance) -> Denoise:
    """Return the denoiser of a batch; a negative condition is that of the guide, if there is one."""
    network = graphed if batch.graphs else (lambda model: model.model)
    negative = None if batch.negative is None else {**conditions, **batch.negative}
    guide, away = guidance.denoiser_of_guide(negative or conditions, network), None
    if guide is None and negative is not None:
        away = model.condition(negative)
    elif guide is None and guidance.is_on and model.cond_stage_model is not None:
        away = model.cond_stage_model.unconditional(len(batch.seeds), conditions)
    return model.denoiser(model.condition(conditions), guidance, away, guide, network(model))


def _start(
    model: LatentDiffusion, sampler: Sampler, batch: Request, noise: SeededNoise, shape: tuple[int, int, int]
) -> Tensor:
    """Return pure noise, or the noised latents of the images to start from, (B, c, h, w)."""
    process, full = model.process, (len(batch.seeds), *shape)
    if batch.images is None:
        eps = noise(full)
        return eps if process.prior_std == 1 else process.prior_std * eps
    z = model.encode(batch.images.to(model.device), noise)
    return process.level(times_like(z, float(sampler.times(process)[0]))).diffuse(z, noise(full))


def with_strength(sampler: Sampler, strength: float, process: Process) -> Sampler:
    """Return the sampler with only the last share `strength` of its steps. UserError unless 0 < strength <= 1."""
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength:g}; use more than 0 (the image stays) to 1 (hardly anything stays)")
    steps = len(sampler.times(process)) - 1
    return replace(sampler, start=max(1, round(strength * steps)))


def clamp_to_pixels(x0: Tensor) -> Tensor:
    """Clamp predicted images to [-1, 1], for diffusion on pixels."""
    return x0.clamp(-1, 1)
