"""From a trial to the configs of its trainings, with what it costs; checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import compat
from ldm.ablation.study import PIXELS, EvaluationSpec, Sampling, Study, Trial, make
from ldm.ablation.workspace import file_name
from ldm.config import trust_base
from ldm.config.check import check_sections
from ldm.config.merge import set_value
from ldm.config.overrides import split_key
from ldm.config.plain import resolve as resolved
from ldm.errors import UserError
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.distribution_metrics import moments
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.report import pyplot
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import train_option
from ldm.networks.unet import UNet
from ldm.sampling import make_sampler
from ldm.sampling.base import Sampler
from ldm.training.plan import Plan, make_plan
from ldm.training.run import instantiate_training
from ldm.training.run_folder import RunFolder
from ldm.weights.load import locate

Content = dict[str, Any]
_PIXELS = {"target": "ldm.models.autoencoder.IdentityAutoencoder"}
_METRICS = ("metrics", "first_stage_metrics")
_NOWHERE = RunFolder(Path("unused"))  # a plan writes nothing


_COUNTED: dict[str, tuple[int, int]] = {}  # FLOPs of network and decoder; trials differ in more than their models


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
    sampling: Sampling
    cost: ModelCost


def resolve(study: Study) -> list[Resolved]:
    """Resolve and check every trial; nothing is written. UserError names the trial that is impossible."""
    for key in _METRICS:
        with _at(f"{study.name}, evaluation.{key}"):
            _suite(study, key).check_count(study.evaluation.num_samples)
    found: list[Resolved] = []
    built: dict[str, tuple[LatentDiffusion, ModelCost]] = {}  # many trials may share a training
    for trial in study.trials():
        with _at(f"{study.name}, {trial}"):
            found.append(_resolve(study, trial, built))
    _check_parameters(study, found)
    return found


def _resolve(study: Study, trial: Trial, built: dict[str, tuple[LatentDiffusion, ModelCost]]) -> Resolved:
    configs = _configs(trial)
    latent, stage = _checked(configs["latent"]), None
    if configs.get("first_stage") == PIXELS:
        latent["model"]["params"]["autoencoder"] = _PIXELS
    elif "first_stage" in configs:
        stage = _first_stage(trial, configs["first_stage"])
        latent["model"]["params"]["autoencoder"] = {key: stage.content["model"][key] for key in ("target", "params")}
    name = _name(study, trial, latent, stage)
    if name not in built:
        built[name] = _build(trial, latent)
    model, cost = built[name]
    sampling = make(Sampling, configs["sample"], "sample")
    _check_sampling(study.evaluation, sampling, model)
    return Resolved(trial, name, latent, stage, sampling, cost)


def _configs(trial: Trial) -> Content:
    """Apply the settings of a trial in order; another config starts afresh, of pixels there is none.

    Returns `latent`, a config; `first_stage`, where one is named, with its `checkpoint`, or PIXELS; `sample`, fields of
    `Sampling`.
    """
    configs: Content = {"sample": {}}
    for key, value in trial.settings:
        part, _, inside = key.partition(".")
        if not inside:
            trust_base([] if value == PIXELS else [value])
            configs[part] = value if value == PIXELS else compat.translate(compat.read(value))
        elif isinstance(configs.get(part), dict):
            configs[part] = set_value(configs[part], split_key(inside), value)
    return configs


def _checked(content: Content) -> Content:
    content = resolved(content)
    check_sections(content)
    return content


def _first_stage(trial: Trial, content: Content) -> FirstStage:
    checkpoint = content.pop("checkpoint", None)
    content = _checked(content)
    make_plan(content, _NOWHERE, trial.seed)
    file = next(value for key, value in reversed(trial.settings) if key == "first_stage")
    return FirstStage(f"{file.stem}-{digest(content, checkpoint)}", content, checkpoint)


def _name(study: Study, trial: Trial, latent: Content, stage: FirstStage | None) -> str:
    label = ""
    for name, value in trial.labels.items():
        keys = [key for settings in study.axes[name].values() for key, _ in settings]
        if not all(key.startswith("sample.") for key in keys):
            label += f"-{file_name(name + str(value))}"
    budget = [study.budget.kind, study.budget.amount, study.budget.points]
    return f"{study.name}{label}-seed{trial.seed}-{digest(latent, trial.seed, budget, stage and stage.name)}"


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
    network_flops, decoder_flops = _counted(plan.model, shape, network, model)
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
    config: Content, shape: tuple[int, int, int], network: nn.Module, model: LatentDiffusion
) -> tuple[int, int]:
    """Return the FLOPs of network and decoder, which take seconds to count, once for each config and latent shape."""
    key = digest(config, shape)
    if key not in _COUNTED:
        in_network = _network_flops(network, shape)
        _COUNTED[key] = in_network, _flops(lambda: model.decode(_empty(shape), quantize=False))
    return _COUNTED[key]


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


def sampler(sampling: Sampling, steps: int) -> Sampler:
    """Return the sampler. UserError for an unknown one, and for an eta where it has none."""
    name = sampling.sampler
    return make_sampler(name, steps=None if name == "ddpm" else steps, eta=sampling.eta)


def _check_sampling(spec: EvaluationSpec, sampling: Sampling, model: LatentDiffusion) -> None:
    """Raise UserError for samples that a model cannot draw: numbers of steps, guidance, sizes."""
    if sampling.scale != 1 and not any(model.conditioners()):
        raise UserError(f"sample.scale is {sampling.scale:g}; a model without conditions has no guidance")
    for steps in spec.all_steps:
        sampler(sampling, steps).times(model.process)
    for name, side in (("H", sampling.H), ("W", sampling.W)):
        if side is not None and side % model.side_multiple:
            raise UserError(f"sample.{name} is {side}; these models need multiples of {model.side_multiple}")


def check_ready(study: Study, trials: Sequence[Resolved]) -> None:
    """Raise UserError if what the study needs is not here: checkpoints, weights of the extractor, packages."""
    pyplot()
    for trial in trials:
        if trial.first_stage is not None and trial.first_stage.checkpoint is not None:
            with _at(f"{study.name}, {trial.trial}: first_stage.checkpoint"):
                locate(trial.first_stage.checkpoint)
    with _at(f"{study.name}, evaluation.extractor"):
        for key in _METRICS:
            if (extractor := _suite(study, key).extractor) is not None:
                moments(torch.zeros(2, 2))  # computed by torch-fidelity
                _ = extractor.hash  # of the weights


def _suite(study: Study, key: str) -> MetricSuite:
    """Make the metrics that stand under a key of `evaluation`. UserError for unknown ones, and unknown extractors."""
    spec = study.evaluation
    return make_metric_suite(getattr(spec, key), spec.extractor, torch.device("cpu"), keep=0)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place of a mistake in front of its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
