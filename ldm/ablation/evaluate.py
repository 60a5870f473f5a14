"""Evaluate the run of a trial with the functions of `ldm.evaluation`, and check beforehand that this is possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm.ablation.study import EvaluationSpec, Measure, Sampling, Study
from ldm.environment import environment
from ldm.errors import UserError
from ldm.evaluation import MetricSuite, Samples, evaluate_reconstructions, evaluate_samples
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.conditions import DataConditions, Unconditional
from ldm.evaluation.distribution_metrics import moments
from ldm.evaluation.image_sets import ImageSet, split_images
from ldm.evaluation.references import ReferenceSet, data_reference
from ldm.evaluation.report import pyplot
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import Loaded, load_first_stage, load_model
from ldm.sampling import make_sampler
from ldm.sampling.base import Sampler
from ldm.weights import load as checkpoint

_KEPT = 64


def measure_samples(
    run: str, folder: str, device: str, measure: Mapping[str, Any], steps: int, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare samples of a run, under the conditions of its validation set, with that set.

    Args:
        run: run folder, or a checkpoint in one.
        folder: for evaluation.json, samples.png, and the parts from which an interrupted evaluation goes on.
        device: as torch names it.
        measure: fields of `Measure`.
        steps: of the sampler.
        sampling: fields of `Sampling`.

    Returns the content of evaluation.json.
    """
    loaded, given, by = load_model(run, device), Sampling(**sampling), Measure(**measure)
    conditions = Unconditional()
    if any(loaded.model.conditioners()):
        conditions = DataConditions(split_images(loaded.content, "validation", by.count))
    height, width = loaded.trained_size()
    size = given.H or height, given.W or width
    samples = Samples(by.count, size, sampler(given, steps), conditions, scale=given.scale)
    metrics, images = suite(by, device), split_images(loaded.content, "validation")
    metrics.check(by.count)
    reference, weights = _reference(metrics, images, folder), _weights(loaded)
    result = evaluate_samples(loaded.model, samples, metrics, reference, Path(folder) / "samples", weights)
    return result.write(Path(folder), _made(loaded, device))


def measure_first_stage(run: str, folder: str, device: str, measure: Mapping[str, Any]) -> dict[str, Any]:
    """Measure reconstructions of validation images by the first stage inside a latent run; see `measure_samples`."""
    loaded, by = load_first_stage(run, device), Measure(**measure)
    metrics, images = suite(by, device), split_images(loaded.content, "validation", by.count)
    metrics.check(len(images))
    reference, weights = _reference(metrics, images, folder), _weights(loaded)
    result = evaluate_reconstructions(
        loaded.autoencoder, images, metrics, reference, Path(folder) / "samples", weights
    )
    return result.write(Path(folder), _made(loaded, device))


def suite(measure: Measure, device: str = "cpu") -> MetricSuite:
    """Return the metrics. UserError for unknown ones, and for unknown extractors."""
    return make_metric_suite(measure.metrics, measure.extractor, torch.device(device), _KEPT)


def sampler(sampling: Sampling, steps: int) -> Sampler:
    """Return the sampler. UserError for an unknown one, and for an eta where it has none."""
    name = sampling.sampler
    return make_sampler(name, steps=None if name == "ddpm" else steps, eta=sampling.eta)


def _reference(metrics: MetricSuite, images: ImageSet, folder: str) -> ReferenceSet | None:
    if not metrics.needs_reference:
        return None
    return data_reference(images, metrics.extractor, Path(folder).parent / "references")


def _weights(loaded: Loaded) -> dict[str, str]:
    return {name: value for name, value in loaded.provenance().items() if name in ("weights", "checkpoint_sha256")}


def _made(loaded: Loaded, device: str) -> dict[str, Any]:
    return {**environment(), "device": device, "checkpoint": str(loaded.checkpoint)}


# ---------------------------------------------------------------------------------------------------- checks beforehand


def check_metrics(study: Study) -> None:
    """Raise UserError for unknown metrics and extractors, and for too few samples."""
    for name, measure in _measures(study.evaluation):
        with _at(f"{study.name}, evaluation.{name}"):
            suite(measure).check_count(measure.count)


def check_sampling(spec: EvaluationSpec, sampling: Sampling, model: LatentDiffusion) -> None:
    """Raise UserError for samples that a model cannot draw: numbers of steps, sizes."""
    for steps in spec.all_steps:
        sampler(sampling, steps).times(model.process)
    for name, side in (("H", sampling.H), ("W", sampling.W)):
        if side is not None and side % model.side_multiple:
            raise UserError(f"sample.{name} is {side}; these models need multiples of {model.side_multiple}")


def check_ready(study: Study) -> None:
    """Raise UserError if what the study needs is not here: checkpoints, weights of the extractor, packages."""
    pyplot()
    for trial in study.trials():
        if trial.variant.checkpoint is not None:
            with _at(f"{study.name}, {trial}: first_stage.checkpoint"):
                checkpoint.locate(trial.variant.checkpoint)
    extractors = [suite(measure).extractor for _, measure in _measures(study.evaluation)]
    with _at(f"{study.name}, evaluation.extractor"):
        for extractor in extractors:
            if extractor is not None:
                moments(torch.zeros(2, 2))  # computed by torch-fidelity
                _ = extractor.hash  # of the weights


def _measures(spec: EvaluationSpec) -> tuple[tuple[str, Measure], ...]:
    return ("metrics", spec.of_samples), ("first_stage_metrics", spec.of_first_stages)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place of a mistake in front of its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
