"""Pictures that show how training goes: `previews(module, batch, draws, options)` for each kind of module.

Every value is a batch of images (N, C, H, W) in [-1, 1]; where the name ends in _row, N counts ROW_COLUMNS per row.
All draws come from `draws`, so that looking changes nothing in the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.conditioning.base import EMBEDDED, Conditioning
from ldm.diffusion.prediction import Denoise
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.generate import clamp_to_pixels
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.sampling.base import Sampler, identity
from ldm.sampling.ddim import DDIM
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.live_guidance import LiveGuidance
from ldm.training.randomness import Draws

Pictures = dict[str, Tensor]
ROW_COLUMNS = 8


@dataclass(frozen=True)
class PreviewOptions:
    """Say how a diffusion model is sampled, with which guidance (None: none), and how many rows are shown."""

    sampler: Sampler = field(default_factory=DDIM)
    guidance: LiveGuidance | None = None
    rows: int = 2

    def guides(self, model: LatentDiffusion) -> bool:
        """Return whether guided samples are shown: not of a model with neither a condition nor a guide."""
        return self.guidance is not None and (model.cond_stage_model is not None or self.guidance.has_guide)


@singledispatch
def previews(module: nn.Module, batch: Mapping[str, Any], draws: Draws, options: PreviewOptions) -> Pictures:
    """Make the pictures of a batch; a kind of module without pictures gives none."""
    return {}


@previews.register
def _(module: AutoencoderTraining, batch: Mapping[str, Any], draws: Draws, options: PreviewOptions) -> Pictures:
    x = batch[module.image_key]
    pictures = {"inputs": x, "reconstructions": module.model(x, draws.normal)[0]}
    if module.model_ema is not None:
        with module.ema_scope():
            pictures["reconstructions_ema"] = module.model(x, draws.normal)[0]
    return pictures


@previews.register
def _(module: DiffusionTraining, batch: Mapping[str, Any], draws: Draws, options: PreviewOptions) -> Pictures:
    model = module.model
    z = model.latents(batch, draws.normal)  # (N, c, h, w)
    pictures = {"inputs": batch.get(model.image_key, model.decode(z))}
    if not isinstance(model.first_stage_model, IdentityAutoencoder):
        pictures["reconstructions"] = model.decode(z)
    pictures |= {key: value for key, value in batch.items() if key != model.image_key and _is_picture(key, value)}
    pictures["diffusion_row"] = _diffusion_row(model, z[: options.rows], draws)
    conditioning = model.condition(batch)
    guidance = options.guidance.ready(module) if options.guides(model) else None
    with module.ema_scope():
        guided = None
        if guidance is not None:
            away = guidance.away_from(model, len(z))
            guide = guidance.denoiser_of_guide(batch if away is None else {**batch, **away})
            negative = None if away is None or guide is not None else model.condition({**batch, **away})
            guided = model.denoiser(conditioning, guidance, negative, guide)
        pictures |= _samples(model, z.shape, conditioning, guided, draws, options)
    return pictures


def _is_picture(key: str, value: Any) -> bool:
    if key == "moments" or key.startswith(EMBEDDED):
        return False
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point() and value.shape[1] in (1, 3)


def _diffusion_row(model: LatentDiffusion, z: Tensor, draws: Draws) -> Tensor:
    """Noise each latent more and more from left to right, and decode; where noise grows without bound, scaled back."""
    eps, process = draws.normal(z.shape), model.process
    noised = []
    for u in torch.linspace(0, 1 - 2**-20, ROW_COLUMNS):
        level = process.level(process.from_uniform(u.expand(len(z))).to(z.device))
        noised.append(level.diffuse(z, eps) / (level.alpha**2 + level.sigma**2).sqrt())
    return _decoded_row(model, noised)


def _decoded_row(model: LatentDiffusion, columns: list[Tensor]) -> Tensor:
    return model.decode(rearrange(torch.stack(columns), "column n c h w -> (n column) c h w"))


def _samples(
    model: LatentDiffusion,
    shape: tuple[int, ...],
    conditioning: Conditioning | None,
    guided: Denoise | None,
    draws: Draws,
    options: PreviewOptions,
) -> Pictures:
    process = model.process
    x_T = process.prior_std * draws.normal(shape)
    refine = clamp_to_pixels if isinstance(model.first_stage_model, IdentityAutoencoder) else identity
    denoisers = {"samples": model.denoiser(conditioning)} | ({} if guided is None else {"samples_guided": guided})
    pictures: Pictures = {}
    for name, denoise in denoisers.items():
        steps = list(options.sampler(denoise, x_T, process, refine=refine, noise=draws.normal))
        pictures[name] = model.decode(steps[-1].x)
        if name == "samples":
            shown = torch.linspace(0, len(steps) - 1, min(ROW_COLUMNS, len(steps))).long().tolist()
            pictures["denoise_row"] = _decoded_row(model, [steps[index].x0[: options.rows] for index in shown])
    return pictures
