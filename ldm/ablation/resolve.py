"""From a trial to the configs of its trainings, with what it costs; checked before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ldm import compat
from ldm.ablation.cost import ModelCost, model_cost
from ldm.ablation.sampling import check_sampling
from ldm.ablation.study import PIXELS, Sampling, Study, Trial, make
from ldm.ablation.workspace import digest, file_name
from ldm.config import trust_base
from ldm.config.check import check_sections
from ldm.config.merge import set_value
from ldm.config.nodes import without_checkpoints
from ldm.config.overrides import apply_overrides, split_key
from ldm.config.plain import resolve as resolved
from ldm.errors import UserError
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.distributions import moments
from ldm.evaluation.image_sets import SPLIT
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.report import pyplot
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import ModelSource, read_config
from ldm.training.plan import make_plan
from ldm.training.run import instantiate_training
from ldm.training.run_folder import RunFolder
from ldm.weights.load import locate

Content = dict[str, Any]
_PIXELS = {"target": "ldm.models.autoencoder.IdentityAutoencoder"}
_METRICS = ("metrics", "first_stage_metrics")
_VALIDATION = "data.params.validation."
_SAMPLE = "sample."
_OF_TRAINED = (_SAMPLE, "latent.checkpoint", f"latent.{_VALIDATION}")  # what a trial may set without a training
_NOWHERE = RunFolder(Path("unused"))  # a plan writes nothing


@dataclass(frozen=True)
class FirstStage:
    """The config of a first stage; with a checkpoint nothing is trained."""

    name: str
    content: Content
    checkpoint: str | None


@dataclass(frozen=True)
class Resolved:
    """A trial with name and config of its latent training; weights of a first stage are not filled in.

    checkpoint: a trained model in place of that training.
    """

    trial: Trial
    name: str
    content: Content
    first_stage: FirstStage | None
    sampling: Sampling
    cost: ModelCost
    checkpoint: str | None = None


@dataclass(frozen=True)
class _Training:
    """What trials that differ in seed and sampling have in common; `model` is on the meta device."""

    content: Content
    first_stage: FirstStage | None
    checkpoint: str | None
    model: LatentDiffusion
    cost: ModelCost

    @property
    def averages(self) -> list[str]:
        """Return the names of the averages that are kept beside the usual one."""
        return list(self.content["training"].get("params", {}).get("averages") or {})


def resolve(study: Study) -> list[Resolved]:
    """Resolve and check every trial; nothing is written. UserError names the trial that is impossible."""
    for key in _METRICS:
        with _at(f"{study.name}, evaluation.{key}"):
            suite = _suite(study, key)
            suite.check_count(study.evaluation.num_samples)
            suite.check_source(f"{SPLIT}validation")
    found: list[Resolved] = []
    built: dict[str, _Training] = {}
    read = cache(lambda path: compat.translate(compat.read(path)))
    for trial in study.trials():
        with _at(f"{study.name}, {trial}"):
            found.append(_resolve(study, trial, read, built))
    _check_equal(study, found)
    return found


def _resolve(study: Study, trial: Trial, read: Callable[[Path], Content], built: dict[str, _Training]) -> Resolved:
    others = repr([setting for setting in trial.settings if not setting[0].startswith(_SAMPLE)])
    if others not in built:
        built[others] = _build(study, trial, _configs(trial, read))
    training, given = built[others], {}
    for key, value in trial.settings:
        if key.startswith(_SAMPLE):
            given = set_value(given, split_key(key.removeprefix(_SAMPLE)), value)
    sampling = make(Sampling, given, "sample")
    check_sampling(study.evaluation, sampling, training.model, training.averages)
    stage, checkpoint = training.first_stage, training.checkpoint
    name = _name(study, trial, training.content, checkpoint or (stage and stage.name))
    return Resolved(trial, name, training.content, stage, sampling, training.cost, checkpoint)


def _build(study: Study, trial: Trial, configs: Content) -> _Training:
    """Build a latent training without weights, and measure it. UserError for what cannot be trained together."""
    checkpoint = configs["latent"].get("checkpoint")
    if checkpoint is None:
        latent, stage = _to_train(trial, configs)
    else:
        latent, stage = _of_run(study, trial, checkpoint), None
    plan = make_plan(latent, _NOWHERE, trial.seed)
    with torch.device("meta"):
        model = instantiate_training(plan.config).model
    if not isinstance(model, LatentDiffusion):
        raise UserError(f"latent: {plan.model['target']} is no latent diffusion model")
    factor = model.first_stage_model.factor
    if trial.labels.get("f", factor) != factor:
        raise UserError(f"f={trial.labels['f']}: the first stage has f={factor}; give it one level per doubling")
    return _Training(latent, stage, checkpoint, model, model_cost(plan, model))


def _to_train(trial: Trial, configs: Content) -> tuple[Content, FirstStage | None]:
    """Return the config of a latent training, and its first stage where one is named."""
    latent = _checked({key: value for key, value in configs["latent"].items() if key != "checkpoint"})
    stage = None
    if configs.get("first_stage") == PIXELS:
        latent["model"]["params"]["autoencoder"] = _PIXELS
    elif "first_stage" in configs:
        stage = _first_stage(trial, configs["first_stage"])
        latent["model"]["params"]["autoencoder"] = {key: stage.content["model"][key] for key in ("target", "params")}
    return latent, stage


def _of_run(study: Study, trial: Trial, checkpoint: str) -> Content:
    """Return the config of a trained model, with the validation set of the study. UserError for axes of training."""
    for axis, value in trial.labels.items():
        for key, _ in study.axes[axis][value]:
            if not key.startswith(_OF_TRAINED):
                raise UserError(f"axes.{axis} sets {key}; latent.checkpoint is trained already, leave one of them out")
    content = apply_overrides(read_config(ModelSource(checkpoint)), data_overrides(trial))
    return _checked({**content, "model": without_checkpoints(content["model"])})


def data_overrides(trial: Trial) -> tuple[str, ...]:
    """Return what a trial sets of the validation set, as overrides of the config of a run."""
    settings = ((key.removeprefix("latent."), value) for key, value in trial.settings)
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings if key.startswith(_VALIDATION))


def _configs(trial: Trial, read: Callable[[Path], Content]) -> Content:
    """Apply the settings of a trial in order; another config starts afresh, of pixels there is none.

    `read` reads a config. Returns `latent` and, if named, `first_stage`: configs, with `checkpoint` if set, or PIXELS.
    """
    configs: Content = {}
    for key, value in trial.settings:
        part, _, inside = key.partition(".")
        if not inside:
            trust_base([] if value == PIXELS else [value])
            configs[part] = value if value == PIXELS else read(value)
        elif isinstance(configs.get(part), dict):
            configs[part] = set_value(configs[part], split_key(inside), value)
    return configs


def _checked(content: Content) -> Content:
    content = resolved(content)
    check_sections(content)
    return content


def _first_stage(trial: Trial, content: Content) -> FirstStage:
    checkpoint = content.get("checkpoint")
    content = _checked({key: value for key, value in content.items() if key != "checkpoint"})
    make_plan(content, _NOWHERE, trial.seed)
    file = next(value for key, value in reversed(trial.settings) if key == "first_stage")
    return FirstStage(f"{file.stem}-{digest(content, checkpoint)}", content, checkpoint)


def _name(study: Study, trial: Trial, latent: Content, origin: str | None) -> str:
    label = ""
    for name, value in trial.labels.items():
        keys = [key for settings in study.axes[name].values() for key, _ in settings]
        if not all(key.startswith("sample.") for key in keys):
            label += f"-{file_name(name + str(value))}"
    budget = [study.budget.kind, study.budget.amount, study.budget.points]
    return f"{study.name}{label}-seed{trial.seed}-{digest(latent, trial.seed, budget, origin)}"


def _check_equal(study: Study, resolved: list[Resolved]) -> None:
    """Raise UserError if networks differ by more than the budget allows."""
    budget = study.budget
    for name, tolerance, size in (
        ("parameters", budget.parameters, lambda cost: cost.parameters),
        ("flops", budget.flops, lambda cost: cost.network_flops),
    ):
        counts = {str(one.trial): size(one.cost) for one in resolved}
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        difference = math.inf if counts[least] == 0 else counts[most] / counts[least] - 1
        if tolerance is not None and difference > tolerance:
            raise UserError(
                f"{study.name}: the networks are not equal in {name}: {least} has {counts[least]:,}, {most} has "
                f"{counts[most]:,}, which is {difference:.0%} more; budget.{name} allows {tolerance:.0%}"
            )


def check_ready(study: Study, trials: Sequence[Resolved]) -> None:
    """Raise UserError if what the study needs is not here: checkpoints, weights of the extractor, packages."""
    pyplot()
    for trial in trials:
        if trial.checkpoint is not None:
            with _at(f"{study.name}, {trial.trial}: latent.checkpoint"):
                locate(trial.checkpoint)
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
