"""Metrics of a few samples during training, which show whether it still improves.

    lightning.callbacks.sample_metrics:
      target: ldm.training.sample_metrics.SampleMetrics
      params: {every_n_steps: 5000, count: 512, metrics: [frechet], extractor: scenenet}

Of so few samples a Frechet distance is biased upwards: compare it along one run, not between papers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from ldm.data.shards.streams import StreamDecoder
from ldm.errors import UserError
from ldm.evaluation import MetricSuite, Samples, evaluate_samples
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.conditions import Conditions, DataConditions, Unconditional
from ldm.evaluation.distributions import Values
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.references import data_reference
from ldm.evaluation.resumable import wait_for_all
from ldm.models.guidance import Guidance
from ldm.sampling.ddim import DDIM
from ldm.training.callbacks import chosen_guidance, evaluating
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.strategies import whole_weights


class SampleMetrics(pl.Callback):
    """Every `every_n_steps` optimiser steps draw `count` samples with the averaged weights and log their metrics.

    Conditions and reference come from the validation set, metrics and extractor are named as for scripts/evaluate.py;
    values are logged as `samples/NAME[EXTRACTOR]`. The samples are divided among the ranks and have the same seeds each
    time; training does not depend on them. The guide of a `guidance` may be an average of the training, `ema:NAME`.
    UserError without a validation set.
    """

    def __init__(
        self,
        directory: str | Path,
        every_n_steps: int = 5000,
        count: int = 256,
        metrics: Sequence[str] = ("frechet",),
        extractor: str = "scenenet",
        steps: int = 20,
        guidance_scale: float | None = None,
        batch_size: int = 50,
        guidance: Guidance | None = None,
    ) -> None:
        if every_n_steps < 1 or count < 1:
            raise UserError(f"sample_metrics: every_n_steps {every_n_steps} and count {count} must be positive")
        self.directory = Path(directory).parent / "sample_metrics"
        self.every_n_steps, self.count = every_n_steps, count
        self.metrics, self.extractor = tuple(metrics), extractor
        scale = 1.0 if guidance_scale is None and guidance is None else guidance_scale
        self.guidance = chosen_guidance("sample_metrics", scale, guidance)
        self.sampler, self.batch_size = DDIM(steps), batch_size
        self._last_step = 0
        self._metrics: MetricSuite | None = None

    def check_samples(self, module: nn.Module) -> None:
        """Raise UserError for guidance that a model cannot have."""
        if isinstance(module, DiffusionTraining):
            self.guidance.check(module)
            self.guidance.warn_if_untrained(module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the metrics; UserError, before the first step, for what they lack."""
        self._last_step = trainer.global_step
        if not isinstance(pl_module, DiffusionTraining):
            raise UserError(f"sample_metrics: {type(pl_module).__name__} draws no samples; leave the callback out")
        if not trainer.val_dataloaders:
            raise UserError("sample_metrics: needs a validation set; give data.params.validation")
        self.guidance.check(pl_module)  # again, now that the latent scale is known
        self.directory = trainer.strategy.broadcast(self.directory)  # started apart, ranks name their run folders apart
        self._metrics = make_metric_suite(self.metrics, self.extractor, pl_module.device, keep=0)
        self._metrics.check(self.count)
        images = self._validation_images(trainer)
        self._metrics.check_source(images.name)
        for name, metric in self._metrics.sets.items():
            if metric.needs_reference and len(images) < metric.minimum:
                found = f"there are {len(images)} of the {self.count} that `count` asks for"
                raise UserError(f"sample_metrics: {name}: needs {metric.minimum} validation images or more, {found}")
        self._metrics.check_batch(_conditions(pl_module, images)(range(1)), images.shape)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DiffusionTraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure every `every_n_steps` optimiser steps."""
        step = trainer.global_step
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        with whole_weights(trainer), torch.no_grad(), evaluating(pl_module):
            guidance = self.guidance.ready(pl_module)
            with pl_module.ema_scope():
                values = self._measure(pl_module, guidance, self._validation_images(trainer), step)
        _log(trainer, {f"samples/{name}": value for name, value in values.items()})

    def _validation_images(self, trainer: pl.Trainer) -> ImageSet:
        """Return the validation images; the training limits how many may be unreadable."""
        dataset = trainer.val_dataloaders.dataset
        dataset = dataset.stream if isinstance(dataset, StreamDecoder) else dataset
        return ImageSet(dataset, "data.params.validation", self.count, replaces=True)

    def _measure(self, module: DiffusionTraining, guidance: Guidance, images: ImageSet, step: int) -> Values:
        metrics = self._metrics
        reference = None
        if metrics.needs_reference:
            reference = data_reference(images, metrics.extractor, self.directory / "references")
            metrics.check_reference(reference)
        conditions, size = _conditions(module, images), images.shape[1:]
        samples = Samples(self.count, size, self.sampler, conditions, scale=guidance, batch_size=self.batch_size)
        folder = self.directory / f"step={step:09}"
        result = evaluate_samples(module.model, samples, metrics, reference, folder, {"step": step})
        for model in (module.model, *guidance.guides):
            model.graphs.clear()  # their memory is the training's
        wait_for_all()
        _remove(folder)
        return result.values


def _conditions(module: DiffusionTraining, images: ImageSet) -> Conditions:
    return Unconditional() if module.model.cond_stage_model is None else DataConditions(images)


@rank_zero_only
def _log(trainer: pl.Trainer, values: Values) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": float(trainer.current_epoch)}, step=trainer.global_step)


@rank_zero_only
def _remove(folder: Path) -> None:
    shutil.rmtree(folder)
