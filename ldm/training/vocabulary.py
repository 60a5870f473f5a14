"""Tokenizers whose vocabulary is learned from the captions of the training set."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from ldm.conditioning.text import TextConditioner
from ldm.conditioning.tokenizers import TrainedTokenizer
from ldm.data.core.module import DataModule

_log = logging.getLogger(__name__)


def fit_tokenizers(model: nn.Module, data: DataModule) -> None:
    """Learn the vocabulary of tokenizers that have none yet."""
    for conditioner in _with_trained_tokenizer(model):
        if not conditioner.tokenizer.is_fitted:
            _log.info("learning a vocabulary from the captions of the training set")
            conditioner.tokenizer.fit(data.train_texts(conditioner.key))


def save_tokenizers(model: nn.Module, folder: Path) -> None:
    """Write the vocabularies for people to read; checkpoints hold them too."""
    for conditioner in _with_trained_tokenizer(model):
        conditioner.tokenizer.save(folder)


def _with_trained_tokenizer(model: nn.Module) -> list[TextConditioner]:
    found = [module for module in model.modules() if isinstance(module, TextConditioner)]
    return [module for module in found if isinstance(module.tokenizer, TrainedTokenizer)]
