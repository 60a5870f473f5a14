"""From a trial to the config of its training, checked as `main.py --dry-run` does, with what it costs.

Trainings are named by their content: trials that differ only in sampling share a training, and trials that differ only
behind the first stage share that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import compat
from ldm.ablation.evaluate import check_metrics, check_sampling
from ldm.ablation.study import PIXELS, Study, Trial, Variant
from ldm.config import trust_base
from ldm.config.check import check_sections
from ldm.config.merge import set_value
from ldm.config.overrides import split_key
from ldm.config.plain import resolve as resolved
from ldm.errors import UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import train_option
from ldm.networks.unet import UNet
from ldm.training.plan import Plan, make_plan
from ldm.training.run import instantiate_training
from ldm.training.run_folder import RunFolder

Content = dict[str, Any]
_PIXELS = {"target": "ldm.models.autoencoder.IdentityAutoencoder"}
_NOWHERE = RunFolder(Path("unused"))  # a plan writes nothing


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


@dataclass(frozen=True)
class FirstStage:
    """The config of a first stage; with a checkpoint nothing is trained."""

    name: str
    content: Content
    checkpoint: str | None


@dataclass(frozen=True)
class Resolved:
    """A trial with name and config of its latent training; weights of a first stage are not filled in."""

    trial: Trial
    name: str
    content: Content
    first_stage: FirstStage | None
    cost: ModelCost


def resolve(study: Study) -> list[Resolved]:
    """Resolve and check every trial; nothing is written. UserError names the trial that is impossible."""
    check_metrics(study)
    found: list[Resolved] = []
    built: dict[str, tuple[LatentDiffusion, ModelCost]] = {}  # many trials may share a training
    for trial in study.trials():
        try:
            found.append(_resolve(study, trial, built))
        except UserError as error:
            raise UserError(f"{study.name}, {trial}: {error}") from error
    _check_parameters(study, found)
    return found


def _resolve(study: Study, trial: Trial, built: dict[str, tuple[LatentDiffusion, ModelCost]]) -> Resolved:
    latent, stage = _load(trial.variant, "latent"), None
    if trial.variant.config("first_stage") == PIXELS:
        latent["model"]["params"]["autoencoder"] = _PIXELS
    elif trial.variant.config("first_stage") is not None:
        stage = _first_stage(trial)
        latent["model"]["params"]["autoencoder"] = {key: stage.content["model"][key] for key in ("target", "params")}
    name = _name(study, trial, latent, stage)
    if name not in built:
        built[name] = _build(trial, latent)
    model, cost = built[name]
    check_sampling(study.evaluation, trial.variant.sampling, model)
    return Resolved(trial, name, latent, stage, cost)


def _first_stage(trial: Trial) -> FirstStage:
    content, checkpoint = _load(trial.variant, "first_stage"), trial.variant.checkpoint
    make_plan(content, _NOWHERE, trial.seed)
    return FirstStage(
        f"{trial.variant.config('first_stage').stem}-{digest(content, checkpoint)}", content, checkpoint
    )


def _name(study: Study, trial: Trial, latent: Content, stage: FirstStage | None) -> str:
    kept = {
        name: value
        for name, value in trial.labels.items()
        if any(variant.changes_training for variant in study.axes[name].values())
    }
    label = "".join(f"-{name}{re.sub(r'[^A-Za-z0-9.]+', '_', str(value))}" for name, value in kept.items())
    budget = [study.budget.kind, study.budget.amount, study.budget.points]
    return f"{study.name}{label}-seed{trial.seed}-{digest(latent, trial.seed, budget, stage and stage.name)}"


def _load(variant: Variant, part: str) -> Content:
    trust_base([variant.config(part)])
    content = compat.translate(compat.read(variant.config(part)))
    for key, value in variant.of(part):
        if key != "checkpoint":
            content = set_value(content, split_key(key), value)
    content = resolved(content)
    check_sections(content)
    return content


def digest(*parts: Any) -> str:
    """Return eight characters that follow from plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _build(trial: Trial, content: Content) -> tuple[LatentDiffusion, ModelCost]:
    """Build a latent training without weights, and measure it. UserError for what cannot be trained together."""
    plan = make_plan(content, _NOWHERE, trial.seed)
    with torch.device("meta"):
        model = instantiate_training(plan.config).model
    if not isinstance(model, LatentDiffusion):
        raise UserError(f"latent: {plan.model['target']} is no latent diffusion model")
    return model, _cost(trial, plan, model)


def _cost(trial: Trial, plan: Plan, model: LatentDiffusion) -> ModelCost:
    size = train_option(plan.config, "size")
    if size is None:
        raise UserError("latent: data.params.train has no size")
    height, width = (size, size) if isinstance(size, int) else size
    stage, network = model.first_stage_model, model.model.diffusion_model
    if trial.labels.get("f", stage.factor) != stage.factor:
        raise UserError(f"f={trial.labels['f']}: the first stage has f={stage.factor}; give it one level per doubling")
    shape = stage.latent_shape(height, width)
    return ModelCost(
        factor=stage.factor,
        latent_shape=shape,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        network_flops=_network_flops(network, shape),
        decoder_flops=_flops(lambda: model.decode(_empty(shape), quantize=False)),
        global_batch=plan.batch.total,
        learning_rate=plan.learning_rate,
    )


def _network_flops(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Count one forward pass, with one token of context where the network takes some."""
    if not isinstance(network, UNet):
        raise UserError(f"latent: {type(network).__name__} is no U-Net; its levels cannot be compared")
    _, height, width = shape
    if height % network.size_multiple or width % network.size_multiple:
        raise UserError(
            f"latents of {height}x{width} for a U-Net whose levels need multiples of {network.size_multiple}; "
            "give it fewer levels (channel_mult), or a smaller f, or larger images"
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


def _check_parameters(study: Study, resolved: list[Resolved]) -> None:
    tolerance = study.budget.parameters
    counts = {str(one.trial): one.cost.parameters for one in resolved}
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    difference = math.inf if counts[least] == 0 else counts[most] / counts[least] - 1
    if tolerance is not None and difference > tolerance:
        raise UserError(
            f"{study.name}: the networks are not of equal size: {least} has {counts[least]:,} parameters, {most} has "
            f"{counts[most]:,}, which is {difference:.0%} more; budget.parameters allows {tolerance:.0%}"
        )
