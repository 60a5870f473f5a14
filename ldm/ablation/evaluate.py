"""Evaluate the run of a trial with the functions of `ldm.evaluation`, and check beforehand that this is possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.ablation.study import EvaluationSpec, Measure, Sampling, Study
from ldm.errors import UserError
from ldm.evaluation import MetricSuite
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.distribution_metrics import moments
from ldm.evaluation.report import pyplot
from ldm.evaluation.run import (
    EvaluationOptions,
    ReferenceOptions,
    SampleOptions,
    evaluate_first_stage,
    evaluate_model,
)
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import ModelSource
from ldm.sampling import make_sampler
from ldm.sampling.base import Sampler
from ldm.weights import load as checkpoint

_BATCH = 50


def evaluate_run(
    run: str, folder: str, device: str, measure: Mapping[str, Any], sampling: Mapping[str, Any], steps: int | None
) -> dict[str, Any]:
    """Measure samples of a run under the conditions of its validation set, or its first stage, against that set.

    Args:
        run: run folder, or a checkpoint in one.
        folder: where the result goes, and from where an interrupted evaluation goes on.
        device: as torch names it.
        measure: fields of `Measure`.
        sampling: fields of `Sampling`.
        steps: of the sampler; None measures the first stage.

    Returns the content of evaluation.json.
    """
    how, by, out = Sampling(**sampling), Measure(**measure), Path(folder)
    samples = SampleOptions(
        sampler(how, steps or 1), how.scale if steps else 1.0, None, 0, (how.H, how.W), "data", has_neighbours=False
    )
    reference = ReferenceOptions("validation", None, out.parent / "references", None)
    options = EvaluationOptions(
        ModelSource(run), torch.device(device), tuple(by.metrics), by.extractor, by.count, _BATCH, samples, reference,
        out, (),
    )  # fmt: skip
    return (evaluate_first_stage if steps is None else evaluate_model)(options, _progress)


def _progress(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, mininterval=30.0)  # into a log file


def suite(measure: Measure) -> MetricSuite:
    """Return the metrics. UserError for unknown ones, and for unknown extractors."""
    return make_metric_suite(measure.metrics, measure.extractor, torch.device("cpu"), keep=0)


def sampler(sampling: Sampling, steps: int) -> Sampler:
    """Return the sampler. UserError for an unknown one, and for an eta where it has none."""
    name = sampling.sampler
    return make_sampler(name, steps=None if name == "ddpm" else steps, eta=sampling.eta)


# ---------------------------------------------------------------------------------------------------- checks beforehand


def check_metrics(study: Study) -> None:
    """Raise UserError for unknown metrics and extractors, and for too few samples."""
    for name, measure in _measures(study.evaluation):
        with _at(f"{study.name}, evaluation.{name}"):
            suite(measure).check_count(measure.count)


def check_sampling(spec: EvaluationSpec, sampling: Sampling, model: LatentDiffusion) -> None:
    """Raise UserError for samples that a model cannot draw: numbers of steps, guidance, sizes."""
    if sampling.scale != 1 and not any(model.conditioners()):
        raise UserError(f"sample.scale is {sampling.scale:g}; a model without conditions has no guidance")
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
