"""From a trial to the configs of its trainings, checked as `main.py --dry-run` does, and what they amount to.

Trainings are named by what is in them: two trials that differ only in how they are sampled share a training, and trials
that differ only behind the first stage share that.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from ldm import compat, config
from ldm.ablation.judging import check_metrics, check_sampling
from ldm.ablation.study import Recipe, Study, Trial
from ldm.cli.arguments import parse
from ldm.diffusion.process import Schedule
from ldm.errors import UserError
from ldm.models.loading import train_option
from ldm.networks.backbone import Backbone
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.plan import Plan, make_plan

Content = dict[str, Any]
_PIXELS = {"target": "ldm.models.autoencoder.IdentityAutoencoder"}


@dataclass(frozen=True)
class Facts:
    """Hold what a latent training amounts to; FLOPs are those of one picture, forward, as torch counts them.

    schedule: its tables have no values; side_multiple: what divides the sides of pictures that can be drawn.
    """

    factor: int
    latent_shape: tuple[int, int, int]
    parameters: int
    network_flops: int
    decoder_flops: int
    schedule: Schedule
    side_multiple: int
    global_batch: int
    learning_rate: float


@dataclass(frozen=True)
class FirstStage:
    """Hold the config of a first stage; with a checkpoint nothing is trained."""

    name: str
    content: Content
    checkpoint: str | None


@dataclass(frozen=True)
class Resolved:
    """Hold a trial with the name and config of its latent training; weights of a first stage are not filled in."""

    trial: Trial
    name: str
    content: Content
    first_stage: FirstStage | None
    facts: Facts


def resolve(study: Study) -> list[Resolved]:
    """Resolve and check every trial of a study; nothing is written. UserError names the trial that cannot be."""
    check_metrics(study)
    resolved: list[Resolved] = []
    measured: dict[str, Facts] = {}  # many trials may share a training
    for trial in study.trials():
        try:
            resolved.append(_resolve(study, trial, measured))
        except UserError as error:
            raise UserError(f"{study.name}, {trial}: {error}") from error
    _check_parameters(study, resolved)
    return resolved


def _resolve(study: Study, trial: Trial, measured: dict[str, Facts]) -> Resolved:
    first_stage, latent = trial.point.first_stage, _load(trial.point.latent, "latent")
    stage = None
    if first_stage.pixels:
        latent["model"]["params"]["autoencoder"] = _PIXELS
    elif first_stage.base is not None:
        content = _load(first_stage, "first_stage")
        name = f"{first_stage.base.stem}-{_digest(content, first_stage.checkpoint)}"
        stage = FirstStage(name, content, first_stage.checkpoint)
        node = content["model"]["params"]["autoencoder"]
        latent["model"]["params"]["autoencoder"] = {key: node[key] for key in ("target", "params")}
        _plan(content, trial.seed)
    kept = {name: value for name, value in trial.labels.items() if _trains(study, name)}
    label = "".join(f"-{name}{re.sub(r'[^A-Za-z0-9.]+', '_', str(value))}" for name, value in kept.items())
    budget = [study.budget.kind, study.budget.amount, study.budget.points]
    digest = _digest(latent, trial.seed, budget, stage and stage.name)
    name = f"{study.name}{label}-seed{trial.seed}-{digest}"
    if name not in measured:
        measured[name] = _facts(trial, latent)
    facts = measured[name]
    check_sampling(study.judgement, trial, facts.schedule, facts.side_multiple)
    return Resolved(trial, name, latent, stage, facts)


def _trains(study: Study, axis: str) -> bool:
    nothing = Recipe()
    return any(point.latent != nothing or point.first_stage != nothing for point in study.axes[axis].values())


def _load(recipe: Recipe, part: str) -> Content:
    if recipe.base is None:
        raise UserError(f"{part}: names no base config")
    settings = []
    for key, value in recipe.settings:
        if isinstance(value, dict) and "target" in value:
            settings.append(f"{key}=null")  # another node takes the place of the one that is there
        settings.append(f"{key}={json.dumps(value)}")
    loaded = compat.load([str(recipe.base)], settings)
    return OmegaConf.to_container(loaded, resolve=True)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _plan(content: Content, seed: int) -> Plan:
    """Make the plan that main.py would make of a config."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return make_plan(parse(["--base", str(path), "--seed", str(seed), "--dry-run"]))


def _facts(trial: Trial, content: Content) -> Facts:
    """Build a latent training without weights, and measure it. UserError for what cannot be trained together."""
    plan = _plan(content, trial.seed)
    with torch.device("meta"):
        model = config.instantiate(plan.model, "model")
    if not isinstance(model, LatentDiffusion):
        raise UserError(f"latent: {plan.model['target']} is no latent diffusion model")
    size = train_option(plan.config, "size")
    if size is None:
        raise UserError("latent: data.params.train has no size")
    height, width = (size, size) if isinstance(size, int) else size
    stage = model.first_stage_model
    if trial.labels.get("f", stage.factor) != stage.factor:
        raise UserError(f"f={trial.labels['f']}: the first stage has f={stage.factor}; give it one level per doubling")
    shape = stage.latent_shape(height, width)
    network = model.model.diffusion_model
    return Facts(
        factor=stage.factor,
        latent_shape=shape,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        network_flops=_network_flops(network, shape),
        decoder_flops=_flops(lambda: model.decode_latents(_empty(shape), quantize=False)),
        schedule=model.schedule,
        side_multiple=stage.factor * network.size_multiple,
        global_batch=plan.batch.total,
        learning_rate=plan.learning_rate,
    )


def _network_flops(network: Backbone, shape: tuple[int, int, int]) -> int:
    """Count one forward pass, with one token of context where the network takes some."""
    _, height, width = shape
    if height % network.size_multiple or width % network.size_multiple:
        raise UserError(
            f"latents of {height}x{width} for a {type(network).__name__} of multiples of {network.size_multiple}; "
            "give it fewer levels (channel_mult), or a smaller f, or larger pictures"
        )
    context = None if network.context_dim is None else _empty((1, network.context_dim))
    classes = None if network.num_classes is None else torch.zeros(1, dtype=torch.long, device="meta")
    x, t = _empty((network.in_channels, height, width)), torch.zeros(1, dtype=torch.long, device="meta")
    return _flops(lambda: network(x, t, context, classes))


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(1, *shape, device="meta")


def _flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def _check_parameters(study: Study, resolved: list[Resolved]) -> None:
    tolerance = study.budget.parameters
    counts: Mapping[str, int] = {str(one.trial): one.facts.parameters for one in resolved}
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    difference = math.inf if counts[least] == 0 else counts[most] / counts[least] - 1
    if tolerance is not None and difference > tolerance:
        raise UserError(
            f"{study.name}: the U-Nets are not of equal size: {least} has {counts[least]:,} parameters, {most} has "
            f"{counts[most]:,}, which is {difference:.0%} more; budget.parameters allows {tolerance:.0%}"
        )
