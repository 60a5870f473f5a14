"""How scripts/evaluate.py is told to judge the models of a study, checked before anything is trained."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch

from ldm.ablation.study import Judgement, Study, Trial
from ldm.cli import evaluate
from ldm.cli.common import choose_sampler
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.distribution_metrics import moments
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.report import pyplot
from ldm.weights import load as checkpoint


def metric_words(judgement: Judgement, metrics: Sequence[str]) -> tuple[str, ...]:
    """Say by what models are judged."""
    return ("--n", str(judgement.num_samples), "--extractor", judgement.extractor, "--metrics", *metrics)


def sample_words(steps: int, sample: Mapping[str, Any]) -> tuple[str, ...]:
    """Say how samples are drawn."""
    return ("--steps", str(steps), *(word for name, value in sample.items() for word in (f"--{name}", str(value))))


def check_metrics(study: Study) -> None:
    """Raise UserError for metrics and extractors that are not known, and for too few samples."""
    for name in ("metrics", "first_stage_metrics"):
        with _at(f"{study.name}, evaluation.{name}"):
            _judges(study.judgement, name).check_count(study.judgement.num_samples)


def check_sampling(judgement: Judgement, trial: Trial, process: Process, side_multiple: int) -> None:
    """Raise UserError for what samples of a trial cannot be drawn with: words, numbers of steps, sizes."""
    for steps in sorted({*judgement.steps, judgement.curve_steps}):
        options = _understood(sample_words(steps, trial.point.sample))
        choose_sampler(options).times(process)
        for name, side in (("H", options.H), ("W", options.W)):
            if side is not None and (side < 1 or side % side_multiple):
                raise UserError(f"sample.{name} is {side}; these models need multiples of {side_multiple}")


def check_ready(study: Study) -> None:
    """Raise UserError if what the study needs is not here: checkpoints, weights of the extractor, packages."""
    pyplot()
    for trial in study.trials():
        given = trial.point.first_stage.checkpoint
        if given is not None:
            with _at(f"{study.name}, {trial}: first_stage.checkpoint"):
                checkpoint.locate(given)
    judges = [_judges(study.judgement, name) for name in ("metrics", "first_stage_metrics")]
    for extractor in [one.extractor for one in judges if one.extractor is not None][:1]:  # both have the same one
        with _at(f"{study.name}, evaluation.extractor"):
            moments(torch.zeros(2, 2))  # computed by torch-fidelity
            _ = extractor.hash  # of the weights


def _judges(judgement: Judgement, name: str) -> MetricSuite:
    return make_metric_suite(getattr(judgement, name), judgement.extractor, torch.device("cpu"), keep=0)


def _understood(words: Sequence[str]) -> argparse.Namespace:
    """Read words as scripts/evaluate.py will. UserError for those that it refuses."""
    heard = io.StringIO()
    try:
        with redirect_stderr(heard):
            return evaluate.parse([*words, "--out", "."])
    except SystemExit as error:
        raise UserError(f"sample: {heard.getvalue().rpartition('error: ')[2].strip()}") from error


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Name the place of a mistake inside the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
