"""The size of a latent model and the FLOPs of its parts, counted on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.ablation.workspace import digest
from ldm.errors import UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import train_option
from ldm.networks.backbone import as_backbone
from ldm.training.plan import Plan

_COUNTED: dict[str, tuple[int, int]] = {}  # FLOPs of network and decoder; trials differ in more than these


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of a latent training; FLOPs of one image, forward, as torch counts them."""

    factor: int
    latent_shape: tuple[int, int, int]
    parameters: int
    network_flops: int
    decoder_flops: int
    global_batch: int
    learning_rate: float


def model_cost(plan: Plan, model: LatentDiffusion) -> ModelCost:
    """Measure the model of a training, both on the meta device. UserError for latents that the network cannot take."""
    size = train_option(plan.config, "size")
    if size is None:
        raise UserError("latent: data.params.train has no size")
    height, width = (size, size) if isinstance(size, int) else size
    stage, network = model.first_stage_model, model.model.diffusion_model
    shape = stage.latent_shape(height, width)
    network_flops, decoder_flops = _counted(plan.model["params"], shape, network, model)
    return ModelCost(
        factor=stage.factor,
        latent_shape=shape,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        network_flops=network_flops,
        decoder_flops=decoder_flops,
        global_batch=plan.batch.total,
        learning_rate=plan.learning_rate,
    )


def _counted(
    parts: Mapping[str, Any], shape: tuple[int, int, int], network: nn.Module, model: LatentDiffusion
) -> tuple[int, int]:
    """Return the FLOPs of network and decoder, which take seconds to count, once for each of their configs."""
    key = digest(parts["network"], parts["autoencoder"], shape)
    if key not in _COUNTED:
        in_network = _network_flops(network, shape)
        _COUNTED[key] = in_network, _flops(lambda: model.decode(_empty(shape), quantize=False))
    return _COUNTED[key]


def _network_flops(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Count one forward pass, with one token of context where the network takes some."""
    network = as_backbone(network)
    _, height, width = shape
    if height % network.size_multiple or width % network.size_multiple:
        raise UserError(
            f"latents of {height}x{width} for a {type(network).__name__} that needs multiples of "
            f"{network.size_multiple}; give it fewer levels or smaller patches, or a smaller f, or larger images"
        )
    context = None if network.context_dim is None else _empty((1, network.context_dim))
    classes = None if network.num_classes is None else torch.zeros(1, dtype=torch.long, device="meta")
    x, t = _empty((network.in_channels, height, width)), torch.zeros(1, dtype=torch.long, device="meta")
    return _flops(lambda: network(x, t, context, classes))


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(1, *shape, device="meta")


def _flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()
