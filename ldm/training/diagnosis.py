"""Warnings in plain words when the adversarial phase or the codebook of a first stage goes wrong, once each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from ldm.autoencoder.losses import AdversarialLoss
from ldm.bounds import Count
from ldm.training.autoencoder import AutoencoderTraining

_LOG = logging.getLogger(__name__)
_CHANCE = (0.45, 0.55)
_AT_CAP = 0.99  # of the bound: what is logged is a mean of bounded values
_USED = 0.1

LEARNS_NOTHING = (
    "the discriminator learns nothing: for %d logged intervals its accuracy (train/disc_accuracy) was that of chance; "
    "let it train before the autoencoder meets it (adversary: warmup), give it more capacity or a higher learning rate"
)
AT_CAP = (
    "train/d_weight is at its cap, %g: the discriminator's gradient has all but vanished and its noise is amplified; "
    "lower the cap (adversary: max_weight, e.g. 10), or let the term begin later or slowly (disc_start, warmup, ramp)"
)
COLLAPSED = (
    "the codebook collapses: for %d logged intervals less than 10%% of its codes were in use (train/codebook_usage); "
    "give the unused new places (model.params.codebook: ldm.training.codebook.CodebookUpkeep with restart_every), "
    "or take fewer codes"
)


class AdversarialWarnings(pl.Callback):
    """Watch what an AutoencoderTraining logs; a symptom must last for `patience` logged intervals in a row.

    For the weight's cap one is enough. Nothing is read from the device but where metrics are logged.
    """

    def __init__(self, patience: Count = 10) -> None:
        self.patience = patience
        self._examined_step = 0
        self._streaks: Counter[str] = Counter()
        self._said: set[str] = set()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Examine the metrics that the step before logged, if it did."""
        step = trainer.global_step
        is_due = step != self._examined_step and step % trainer.log_every_n_steps == 0
        if is_due and trainer.is_global_zero and isinstance(pl_module, AutoencoderTraining):
            self._examined_step = step
            self.examine(trainer.callback_metrics, pl_module.loss, step)

    def examine(self, metrics: Mapping[str, Any], loss: AdversarialLoss, step: int) -> None:
        """Warn of symptoms in the metrics logged after `step` steps of training by this loss."""
        has_adversary = step > loss.disc_start and loss.adversary.factor > 0
        if has_adversary and "train/disc_accuracy" in metrics:
            by_chance = _CHANCE[0] <= float(metrics["train/disc_accuracy"]) <= _CHANCE[1]
            self._judge(LEARNS_NOTHING, by_chance, self.patience, self.patience)
            cap = loss.adversary.max_weight * loss.adversary.weight
            self._judge(AT_CAP, float(metrics["train/d_weight"]) >= _AT_CAP * cap > 0, 1, cap)
        if "train/codebook_usage" in metrics:
            self._judge(COLLAPSED, float(metrics["train/codebook_usage"]) < _USED, self.patience, self.patience)

    def _judge(self, text: str, is_present: bool, patience: int, value: float) -> None:
        self._streaks[text] = self._streaks[text] + 1 if is_present else 0
        if self._streaks[text] >= patience and text not in self._said:
            self._said.add(text)
            _LOG.warning(text, value)
