"""Figures of a few samples during training, so that "is it still improving" has an answer.

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

from ldm.data.shards.streams import StreamDecoder
from ldm.errors import UserError
from ldm.evaluation import build as parts
from ldm.evaluation.conditions import Conditions, DataConditions, Unconditional
from ldm.evaluation.distribution_metrics import Values
from ldm.evaluation.evaluation import Judges, Samples, evaluate_latent_diffusion
from ldm.evaluation.image_sets import PictureSet
from ldm.evaluation.references import data_reference
from ldm.evaluation.resumable import wait_for_all
from ldm.sampling.ddim import DDIM
from ldm.training.callbacks import evaluating
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.strategies import whole_weights


class SampleMetrics(pl.Callback):
    """Every `every_n_steps` optimiser steps draw `count` samples with the averaged weights and log figures of them.

    Conditions and reference are those of the validation set, metrics and extractor named as for scripts/evaluate.py;
    `samples/NAME[EXTRACTOR]` is what they are logged as. The ranks share the samples, which are the same every time but
    for the weights; training is not touched by it. Raises UserError where there is no validation set to compare with.
    """

    def __init__(
        self,
        directory: str | Path,
        every_n_steps: int = 5000,
        count: int = 256,
        metrics: Sequence[str] = ("frechet",),
        extractor: str = "scenenet",
        steps: int = 20,
        guidance_scale: float = 1.0,
        batch_size: int = 50,
    ) -> None:
        if every_n_steps < 1 or count < 1:
            raise UserError(f"sample_metrics: every_n_steps {every_n_steps} and count {count} must be positive")
        self.directory = Path(directory).parent / "sample_metrics"
        self.every_n_steps, self.count = every_n_steps, count
        self.metrics, self.extractor = tuple(metrics), extractor
        self.sampler, self.guidance_scale, self.batch_size = DDIM(steps), guidance_scale, batch_size
        self._seen_step = 0
        self._judges: Judges | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the judges, so that what they lack is told before the first step."""
        self._seen_step = trainer.global_step
        if not isinstance(pl_module, DiffusionTraining):
            raise UserError(f"sample_metrics: {type(pl_module).__name__} draws no samples; leave the callback out")
        if not trainer.val_dataloaders:
            raise UserError("sample_metrics: needs a validation set; give data.params.validation")
        self.directory = trainer.strategy.broadcast(self.directory)  # started apart, ranks name their run folders apart
        self._judges = parts.make_judges(self.metrics, self.extractor, pl_module.device, keep=0)
        self._judges.check(self.count)
        pictures = self._pictures(trainer)
        for name, metric in self._judges.sets.items():
            if metric.needs_reference and len(pictures) < metric.minimum:
                found = f"there are {len(pictures)} of the {self.count} that `count` asks for"
                raise UserError(f"sample_metrics: {name}: needs {metric.minimum} validation pictures or more, {found}")
        self._judges.check_pictures(_conditions(pl_module, pictures)(range(1)), pictures.shape)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DiffusionTraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when it is due, once per optimiser step."""
        step = trainer.global_step
        if step == self._seen_step or step % self.every_n_steps:
            return
        self._seen_step = step
        with whole_weights(trainer), torch.no_grad(), evaluating(pl_module), pl_module.ema_scope():
            values = self._measure(pl_module, self._pictures(trainer), step)
        _log(trainer, {f"samples/{name}": value for name, value in values.items()})

    def _pictures(self, trainer: pl.Trainer) -> PictureSet:
        """Return the validation pictures; how many may be unreadable is for the training to say."""
        dataset = trainer.val_dataloaders.dataset
        dataset = dataset.stream if isinstance(dataset, StreamDecoder) else dataset
        return PictureSet(dataset, "data.params.validation", self.count, replaces=True)

    def _measure(self, module: DiffusionTraining, pictures: PictureSet, step: int) -> Values:
        judges = self._judges
        reference = None
        if judges.needs_reference:
            reference = data_reference(pictures, judges.extractor, self.directory / "references")
            judges.check_reference(reference)
        conditions, size = _conditions(module, pictures), pictures.shape[1:]
        samples = Samples(
            self.count, size, self.sampler, conditions, scale=self.guidance_scale, batch_size=self.batch_size
        )
        folder = self.directory / f"step={step:09}"
        result = evaluate_latent_diffusion(module.model, samples, judges, reference, folder, {"step": step})
        wait_for_all()
        _remove(folder)
        return result.values


def _conditions(module: DiffusionTraining, pictures: PictureSet) -> Conditions:
    return Unconditional() if module.model.cond_stage_model is None else DataConditions(pictures)


@rank_zero_only
def _log(trainer: pl.Trainer, values: Values) -> None:
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": float(trainer.current_epoch)}, step=trainer.global_step)


@rank_zero_only
def _remove(folder: Path) -> None:
    shutil.rmtree(folder)
