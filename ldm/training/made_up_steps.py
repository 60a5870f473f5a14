"""The loss of a step on made-up images and conditions, for each kind of training and of condition.

A step of a kind of one's own is registered: `forward.register`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import reduce, singledispatch

import torch
from torch import Tensor

from ldm.conditioning.base import Conditioner, Conditioning, JointConditioner
from ldm.conditioning.images import FirstStageConditioner, ImageConditioner, InpaintingConditioner, SpatialRescaler
from ldm.conditioning.labels import ClassConditioner
from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.sizes import SizeConditioner
from ldm.conditioning.text import CLIPTextConditioner, EmbeddingConditioner, TextConditioner, TokenConditioner
from ldm.errors import UserError
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.module import TrainingModule

Size = tuple[int, int]


@singledispatch
def forward(training: TrainingModule, batch: int, size: Size) -> Tensor:
    """Return the loss of a step on made-up images (B, C, H, W)."""
    raise UserError(f"{type(training).__name__} is a training of your own")


@forward.register
def _(training: AutoencoderTraining, batch: int, size: Size) -> Tensor:
    class Draws:
        normal = staticmethod(torch.randn)

    return training.losses(torch.randn(batch, training.model.in_channels, *size), Draws(), "train")[0]


@forward.register
def _(training: DiffusionTraining, batch: int, size: Size) -> Tensor:
    if training.teachers:
        raise UserError(f"the teacher of training.params.{next(iter(training.teachers))} is read at the first step")
    model = training.model
    z = model.encode(torch.randn(batch, model.in_channels, *size), torch.randn)
    condition = None if model.cond_stage_model is None else conditioning(model.cond_stage_model, batch, size, z)
    return model.loss(z, condition, torch.zeros(batch), torch.randn(z.shape), training.objective).loss


def conditioning(part: Conditioner | JointConditioner, batch: int, size: Size, z: Tensor) -> Conditioning:
    """Return the condition of a made-up batch."""
    if isinstance(part, JointConditioner):
        return reduce(Conditioning.join, (conditioning(child, batch, size, z) for child in part.children()))
    with nullcontext() if part.trainable else torch.no_grad():
        return Conditioning(**{part.slot: _embedding(part, batch, size, z)})


@singledispatch
def _embedding(part: Conditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    raise UserError(f"{type(part).__name__} is a conditioner of your own")


def _ids(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long)


@_embedding.register
def _(part: TokenConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return part.transformer(_ids(batch, len(part.null_ids)))


@_embedding.register
def _(part: TextConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return part.transformer(_ids(batch, part.tokenizer.max_length))


@_embedding.register
def _(part: CLIPTextConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return part.transformer.text_model(input_ids=_ids(batch, part.tokenizer.max_length)).last_hidden_state


@_embedding.register
def _(part: LayoutConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return part.transformer(_ids(batch, part.tokenizer.length))


@_embedding.register
def _(part: EmbeddingConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return torch.randn(batch, part.num_tokens, part.dim)


@_embedding.register
def _(part: ClassConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    labels = torch.zeros(batch, dtype=torch.long)
    return labels if part.slot == "vector" else part.embedding(labels[:, None])


@_embedding.register
def _(part: ImageConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return torch.randn(batch, part.channels, *z.shape[2:])


@_embedding.register
def _(part: SpatialRescaler, batch: int, size: Size, z: Tensor) -> Tensor:
    return part.embed(torch.randn(batch, part.in_channels, *size))


@_embedding.register(FirstStageConditioner)
@_embedding.register(InpaintingConditioner)
def _(part: FirstStageConditioner | InpaintingConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return part.embed([torch.randn(batch, spec.channels, *size) for spec in part.input_specs().values()])


@_embedding.register
def _(part: SizeConditioner, batch: int, size: Size, z: Tensor) -> Tensor:
    return part.embed(torch.zeros(batch, 2))
