"""From data sets to loaders: what a run reads, in which order, on which rank, with how many workers.

A batch is a dict: `image` float32 (B, C, H, W) in [-1, 1]; numbers become tensors (B,), texts and lists stay lists.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence, Sized
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.bounds import Count, Fraction, Natural
from ldm.data.core.base import Contents, ImageReader
from ldm.data.core.buckets import Bucketed, BucketSampler
from ldm.data.core.classes import check_same_classes
from ldm.data.core.data_errors import DataErrors
from ldm.data.core.derived import source_of, takes_sample_keys
from ldm.data.core.loader import Loader, collate
from ldm.data.core.sampler import EpochSampler, Stream
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError

__all__ = ["DataModule", "contents_of", "errors_of", "iterate"]

_MAX_WORKERS = 8
_BATCHES_WITHOUT_WORKERS = 4  # up to here reading takes less time than starting workers
_MAX_TEXTS = 5000  # read from data sets that cannot list their texts without making the images
_log = logging.getLogger(__name__)


class DataModule:
    """The data sets of a run, and their loaders. All ranks of a distributed run share each set.

    Raises UserError for impossible values, and where validation or test data number named classes in another way than
    the training data.

    Args:
        batch_size: per process.
        num_workers: None for one per core, at most 8, and none for data sets of a few batches.
        shuffle: shuffle the training data in every epoch; validation and test data are read once, in order.
        drop_last: drop the last, smaller batch of a training epoch.
        seed: of the order and of crops and flips.
        max_bad_fraction: the run stops when more than this fraction of the samples of a set (at least 20) could not
            be read; unreadable ones are skipped and counted. None for no limit.
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
            if (errors := errors_of(dataset)) is not None:
                errors.max_bad_fraction = max_bad_fraction
        check_same_classes("data.params.validation", validation, train)
        check_same_classes("data.params.test", test, train)

    def train_loader(self, accumulate: int = 1) -> Loader:
        """Make the loader of the training set, for steps of `accumulate` batches. UserError if there is none."""
        return self._loader(self._train_set(), self.shuffle, self.drop_last, accumulate=accumulate)

    def validation_loader(self) -> Loader | None:
        """Make the loader of the validation set, if there is one."""
        return None if self.validation is None else self._loader(self.validation, evaluation=True)

    def test_loader(self) -> Loader | None:
        """Make the loader of the test set, if there is one."""
        return None if self.test is None else self._loader(self.test, evaluation=True)

    def encoding_loader(self, samples: Sequence[Sequence[SampleKey]]) -> Loader:
        """Make a loader of these batches of the training set."""
        dataset = self._train_set()
        bare = not takes_sample_keys(dataset)
        batches = [[key.index if bare else key for key in batch] for batch in samples]
        options = {"num_workers": self._workers(dataset), "errors": errors_of(dataset), "collate_fn": collate}
        return Loader(dataset, batch_sampler=batches, **options)

    def train_texts(self, key: str = "caption") -> Iterator[str]:
        """List the texts of the training set under a key, to train a tokenizer on them."""
        dataset = source_of(self._train_set())
        if isinstance(dataset, ImageReader):
            yield from dataset.texts(key)
            return
        for item in islice(iterate(dataset), _MAX_TEXTS):
            if not isinstance(item.get(key), str):
                raise UserError(f"data.params.train: items have no text under {key!r}, they have {', '.join(item)}")
            yield item[key]

    @cached_property
    def first_items(self) -> dict[str, dict[str, Any]]:
        """Return the first item of each set by the set's name, read once; {} for an empty set."""
        sets = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: next(iterate(dataset), {}) for name, dataset in sets.items() if dataset is not None}

    def contents(self) -> dict[str, Contents]:
        """Return what each set consists of, by the set's name; cheap, and the same wherever the data lie."""
        sets = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: contents_of(dataset) for name, dataset in sets.items() if dataset is not None}

    def shape_summary(self) -> list[str]:
        """Describe each set in one line, with the shapes in its first item."""
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
        if isinstance(self.train, Sized) and len(self.train) == 0:
            raise UserError(f"data.params.train: {type(self.train).__name__} is empty; give it items")
        return self.train

    def _loader(
        self,
        dataset: Dataset,
        shuffle: bool = False,
        drop_last: bool = False,
        evaluation: bool = False,
        accumulate: int = 1,
    ) -> Loader:
        options: dict[str, Any] = {"num_workers": self._workers(dataset), "errors": errors_of(dataset)}
        order = {"seed": self.seed, "shuffle": shuffle, "evaluation": evaluation}
        if isinstance(dataset, Stream):
            options["sampler"] = dataset.sampler(self.batch_size, **order)
            dataset = dataset.decoder(evaluation)
        elif isinstance(dataset, Bucketed):
            options["sampler"] = BucketSampler(dataset, self.batch_size, accumulate, **order)
        elif not isinstance(dataset, IterableDataset):
            options["sampler"] = EpochSampler(len(dataset), bare=not takes_sample_keys(dataset), **order)
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
        most = min(cores, _MAX_WORKERS)
        if isinstance(dataset, Stream):
            return most
        if isinstance(dataset, IterableDataset):
            return 0  # only its author knows whether workers would repeat each other
        return 0 if len(dataset) <= _BATCHES_WITHOUT_WORKERS * self.batch_size else most


def errors_of(dataset: Dataset | None) -> DataErrors | None:
    """Return the error counts of a data set, or of the one that it is derived from; None if it counts none."""
    source = source_of(dataset)
    return source.errors if isinstance(source, (ImageReader, Stream)) else None


def contents_of(dataset: Dataset) -> Contents:
    """Return what a data set consists of: count and hash of its files, or length and class of one's own data set."""
    source = source_of(dataset)
    if isinstance(contents := getattr(source, "contents", None), Contents):
        return contents
    return Contents(len(source) if isinstance(source, Sized) else 0, type(source).__name__)


def iterate(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Return the items of a data set or stream in order. Raises UserError for a data set of one's own that has none."""
    if not isinstance(dataset, IterableDataset | Sized):
        raise UserError(f"{type(dataset).__name__}: has no __len__, the number of its items")
    items = dataset if isinstance(dataset, IterableDataset) else (dataset[index] for index in range(len(dataset)))
    for item in items:
        if not isinstance(item, Mapping) or not all(isinstance(key, str) for key in item):
            kind = "dicts with texts as keys, such as {'image': ...}"
            raise UserError(f"{type(dataset).__name__}: items must be {kind}; this is a {type(item).__name__}")
        yield item


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} in [{value.min():.2f}, {value.max():.2f}]" if value.numel() else "empty"
    return type(value).__name__
