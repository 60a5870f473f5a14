"""Evaluate the run of a trial with the functions of `ldm.evaluation`, and check beforehand that this is possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import config
from ldm.ablation.study import EvaluationSpec, Study, is_number
from ldm.cli.options import choose_device
from ldm.diffusion.process import Process
from ldm.environment import environment
from ldm.errors import UserError
from ldm.evaluation import MetricSuite, Result, Samples, evaluate_reconstructions, evaluate_samples
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.conditions import DataConditions, Unconditional
from ldm.evaluation.distribution_metrics import moments
from ldm.evaluation.image_sets import ImageSet, split_images
from ldm.evaluation.references import ReferenceSet, data_reference
from ldm.evaluation.report import pyplot
from ldm.models.loading import load_first_stage, load_model
from ldm.sampling import make_sampler
from ldm.sampling.base import Sampler
from ldm.weights import load as checkpoint

RESULT, IMAGES = "evaluation.json", "samples.png"
_KEPT = 64


@dataclass(frozen=True)
class Evaluator:
    """What all evaluations of a trial share: by what, on how many images, where, and where the result goes."""

    metrics: tuple[str, ...]
    extractor: str
    count: int
    device: str
    folder: Path

    def samples(self, run: Path, steps: int, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Compare samples of a run, under the conditions of its validation set, with that set.

        `run` is a run folder or a checkpoint in one. Returns the content of evaluation.json. Goes on where an earlier
        evaluation in this folder was interrupted.
        """
        loaded = load_model(run, choose_device(self.device))
        conditions = Unconditional()
        if any(loaded.model.conditioners()):
            conditions = DataConditions(_validation(loaded.content, self.count))
        height, width = loaded.trained_size()
        size, scale = (sample.get("H", height), sample.get("W", width)), float(sample.get("scale", 1.0))
        samples = Samples(self.count, size, sampler(steps, sample), conditions, scale=scale)
        metrics = self._suite()
        metrics.check(self.count)
        reference = self._reference(metrics, _validation(loaded.content))
        provenance = loaded.provenance()
        result = evaluate_samples(
            loaded.model, samples, metrics, reference, self.folder / "samples", _weights(provenance)
        )
        return self._write(result, provenance)

    def first_stage(self, run: Path) -> dict[str, Any]:
        """Measure reconstructions of validation images by the first stage inside a latent run; see `samples`."""
        loaded, metrics = load_first_stage(run, choose_device(self.device)), self._suite()
        images = _validation(config.read(loaded.config), self.count)
        metrics.check(len(images))
        reference, provenance = self._reference(metrics, images), loaded.provenance()
        result = evaluate_reconstructions(
            loaded.autoencoder, images, metrics, reference, self.folder / "samples", _weights(provenance)
        )
        return self._write(result, provenance)

    def _suite(self) -> MetricSuite:
        return make_metric_suite(self.metrics, self.extractor, choose_device(self.device), _KEPT)

    def _reference(self, metrics: MetricSuite, images: ImageSet) -> ReferenceSet | None:
        if not metrics.needs_reference:
            return None
        return data_reference(images, metrics.extractor, self.folder.parent / "references")

    def _write(self, result: Result, provenance: Mapping[str, str]) -> dict[str, Any]:
        made = {**environment(), "device": self.device, "checkpoint": provenance["checkpoint"]}
        return result.write(self.folder, made)


def sampler(steps: int, sample: Mapping[str, Any]) -> Sampler:
    """Return the sampler that the settings of a study name. UserError for an eta that it cannot use."""
    name = sample.get("sampler", "ddim")
    return make_sampler(name, steps=None if name == "ddpm" else steps, eta=sample.get("eta"))


def _validation(content: Mapping[str, Any], limit: int | None = None) -> ImageSet:
    return split_images(content, "validation", limit)


def _weights(provenance: Mapping[str, str]) -> dict[str, str]:
    return {name: provenance[name] for name in ("weights", "checkpoint_sha256")}


# ---------------------------------------------------------------------------------------------------- checks beforehand


def check_metrics(study: Study) -> None:
    """Raise UserError for unknown metrics and extractors, and for too few samples."""
    for name in ("metrics", "first_stage_metrics"):
        with _at(f"{study.name}, evaluation.{name}"):
            _metric_suite(study.evaluation, name).check_count(study.evaluation.num_samples)


def check_sampling(spec: EvaluationSpec, sample: Mapping[str, Any], process: Process, side_multiple: int) -> None:
    """Raise UserError for settings of samples that are impossible: values, numbers of steps, sizes."""
    for name in ("scale", "eta"):
        if not is_number(sample.get(name, 0)):
            raise UserError(f"sample.{name}: {sample[name]!r} is no number")
    for steps in spec.all_steps:
        sampler(steps, sample).times(process)
    for name in ("H", "W"):
        side = sample.get(name, side_multiple)
        if type(side) is not int or side < 1 or side % side_multiple:
            raise UserError(f"sample.{name} is {side}; these models need multiples of {side_multiple}")


def check_ready(study: Study) -> None:
    """Raise UserError if what the study needs is not here: checkpoints, weights of the extractor, packages."""
    pyplot()
    for trial in study.trials():
        if trial.variant.checkpoint is not None:
            with _at(f"{study.name}, {trial}: first_stage.checkpoint"):
                checkpoint.locate(trial.variant.checkpoint)
    suites = [_metric_suite(study.evaluation, name) for name in ("metrics", "first_stage_metrics")]
    for extractor in [one.extractor for one in suites if one.extractor is not None][:1]:  # both have the same one
        with _at(f"{study.name}, evaluation.extractor"):
            moments(torch.zeros(2, 2))  # computed by torch-fidelity
            _ = extractor.hash  # of the weights


def _metric_suite(spec: EvaluationSpec, name: str) -> MetricSuite:
    return make_metric_suite(getattr(spec, name), spec.extractor, torch.device("cpu"), keep=0)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place of a mistake in front of its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
