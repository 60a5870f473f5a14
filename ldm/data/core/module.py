"""From data sets to batches: what a run reads, in which order, on which rank, by how many workers.

A batch is a dict: `image` float32 (B, C, H, W) in [-1, 1]; numbers become tensors (B,), texts and lists stay lists.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.bounds import Count, Fraction, Natural
from ldm.data.core.base import ImageDataset
from ldm.data.core.classes import insist_on_same_classes
from ldm.data.core.derived import source_of, takes_draws
from ldm.data.core.loader import Loader, collate
from ldm.data.core.sampler import DrawSampler
from ldm.data.core.tally import Tally
from ldm.data.shards.shards import Shards
from ldm.data.shards.streams import Decoder, StreamSampler
from ldm.errors import UserError

__all__ = ["DataModule", "tally_of"]

_MOST_WORKERS = 8
_BATCHES_WITHOUT_WORKERS = 4  # so few batches are read faster than workers start
_TEXTS_READ = 5000  # of data sets whose texts cannot be listed without making the pictures
_log = logging.getLogger(__name__)


class DataModule:
    """Hold the data sets of a run and make their loaders.

    batch_size: per process. num_workers: None for one per core, at most 8, none for tiny data. Training data is
    shuffled anew every epoch unless `shuffle` is false, and its last, smaller batch left out unless `drop_last` is
    false; validation and test data are read once, in order. All are shared out among the ranks of a distributed run.
    max_bad_fraction: of the samples of a set, how many may be unreadable (they are skipped and counted) before the run
    stops; judged from 20 samples on, None for any number. Raises UserError where validation or test data number named
    classes otherwise than the training data.
    """

    def __init__(
        self,
        batch_size: Count,
        train: Dataset | None = None,
        validation: Dataset | None = None,
        test: Dataset | None = None,
        num_workers: Natural | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        max_bad_fraction: Fraction | None = 0.1,
    ) -> None:
        if batch_size < 1 or (num_workers or 0) < 0:
            raise UserError(f"data: batch_size {batch_size} must be positive, num_workers {num_workers} not negative")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train, self.validation, self.test = train, validation, test
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        if max_bad_fraction is not None and not 0 <= max_bad_fraction <= 1:
            raise UserError(f"data: max_bad_fraction {max_bad_fraction} must be in [0, 1], or null for no limit")
        for dataset in (train, validation, test):
            if (tally := tally_of(dataset)) is not None:
                tally.max_bad_fraction = max_bad_fraction
        insist_on_same_classes("data.params.validation", validation, train)
        insist_on_same_classes("data.params.test", test, train)

    def train_loader(self, accumulate: int = 1) -> Loader:
        """Make the loader of the training set, for steps of `accumulate` batches. UserError if there is none."""
        return self._loader(self._train_set(), self.shuffle, self.drop_last, accumulate=accumulate)

    def validation_loader(self) -> Loader | None:
        """Make the loader of the validation set, if there is one."""
        return None if self.validation is None else self._loader(self.validation, evaluation=True)

    def test_loader(self) -> Loader | None:
        """Make the loader of the test set, if there is one."""
        return None if self.test is None else self._loader(self.test, evaluation=True)

    def train_texts(self, key: str = "caption") -> Iterator[str]:
        """List texts of the training set under a key, for a tokenizer to be trained on."""
        dataset = source_of(self._train_set())
        if isinstance(dataset, (ImageDataset, Shards)):
            yield from dataset.texts(key)
            return
        for item in islice(_items(dataset), _TEXTS_READ):
            if not isinstance(item.get(key), str):
                raise UserError(f"data.params.train: items have no text under {key!r}, they have {', '.join(item)}")
            yield item[key]

    @cached_property
    def first_items(self) -> dict[str, dict[str, Any]]:
        """Return the first item of each set by its name, which is read once; {} of an empty set."""
        sets = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: next(_items(dataset), {}) for name, dataset in sets.items() if dataset is not None}

    def shape_summary(self) -> list[str]:
        """Say in one line a set what is read, with the shapes of one item."""
        lines = []
        for name, item in self.first_items.items():
            dataset = getattr(self, name)
            amount = "a stream" if isinstance(dataset, IterableDataset) else f"{len(dataset):,} items"
            shown = ", ".join(f"{key} {_shape(value)}" for key, value in item.items())
            lines.append(f"{name}: {type(dataset).__name__}, {amount} in batches of {self.batch_size}: {shown}")
        return lines

    def _train_set(self) -> Dataset:
        if self.train is None:
            raise UserError("data.params.train: there is no training set; give one")
        return self.train

    def _loader(
        self,
        dataset: Dataset,
        shuffle: bool = False,
        drop_last: bool = False,
        evaluation: bool = False,
        accumulate: int = 1,
    ) -> Loader:
        options: dict[str, Any] = {"num_workers": self._workers(dataset), "tally": tally_of(dataset)}
        if isinstance(dataset, Shards):
            options["sampler"] = StreamSampler(dataset, self.batch_size, self.seed, shuffle, evaluation)
            dataset = Decoder(dataset, evaluation)
        elif not isinstance(dataset, IterableDataset):
            options["sampler"] = DrawSampler(len(dataset), self.seed, shuffle, evaluation, not takes_draws(dataset))
        return Loader(
            dataset,
            batch_size=self.batch_size,
            drop_last=drop_last,
            persistent_workers=options["num_workers"] > 0,
            pin_memory=torch.accelerator.is_available(),
            collate_fn=collate,
            accumulate=accumulate,
            **options,
        )

    def _workers(self, dataset: Dataset) -> int:
        if self.num_workers is not None:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        most = min(cores, _MOST_WORKERS)
        if isinstance(dataset, Shards):
            return most
        if isinstance(dataset, IterableDataset):
            return 0  # only its author knows whether workers would repeat each other
        return 0 if len(dataset) <= _BATCHES_WITHOUT_WORKERS * self.batch_size else most


def tally_of(dataset: Dataset | None) -> Tally | None:
    """Return what counts the unreadable samples of a data set, or of the one that it is derived from."""
    source = source_of(dataset)
    return source.tally if isinstance(source, (ImageDataset, Shards)) else None


def _items(dataset: Dataset) -> Iterator[dict[str, Any]]:
    if isinstance(dataset, IterableDataset):
        yield from dataset
    else:
        for index in range(len(dataset)):
            yield dataset[index]


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} in [{value.min():.2f}, {value.max():.2f}]" if value.numel() else "empty"
    return type(value).__name__
