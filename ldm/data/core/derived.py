"""Data sets derived from another one: the same items with more keys, drawn for each image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.data.core.base import ImageDataset
from ldm.data.core.buckets import Bucketed
from ldm.data.core.latents import CachedLatents
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError

__all__ = ["DerivedDataset", "source_of", "takes_sample_keys"]


class DerivedDataset(Dataset, ABC):
    """Add keys to the items of a map-style data set; a subclass writes `_derive(image, rng)`.

    The random numbers are a function of the `SampleKey`, so that they differ between epochs. `stream` separates the
    generators of a subclass from those of `dataset`. Raises UserError for streams, whose items have no index.
    """

    stream: int

    def __init__(self, dataset: Dataset) -> None:
        name = type(self).__name__
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise UserError(
                f"{name}: {type(dataset).__name__} has no positions; use a map-style data set "
                "(ldm.data.shards.shards.IndexedShards reads local shards)"
            )
        self.dataset = dataset

    @property
    def source(self) -> Dataset:
        """Return the data set that reads the images, through all wrappers."""
        return source_of(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | SampleKey) -> dict[str, Any]:
        key = index if isinstance(index, SampleKey) else SampleKey(int(index))
        item = self.dataset[key if takes_sample_keys(self.dataset) else key.index]
        if "image" not in item:
            raise UserError(f"{type(self).__name__}: the items have no 'image', they have {', '.join(item)}")
        rng = np.random.default_rng([key.seed, key.epoch, key.index, self.stream])
        return {**item, **self._derive(item["image"], rng)}

    @abstractmethod
    def _derive(self, image: torch.Tensor, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        """Return the new keys of an image (C, H, W) in [-1, 1]."""


def source_of(dataset: Dataset | None) -> Dataset | None:
    """Return the data set that reads the images: the same unless it is derived from another one."""
    return dataset.source if isinstance(dataset, (DerivedDataset, Bucketed)) else dataset


def takes_sample_keys(dataset: Dataset) -> bool:
    """Return whether items are indexed by a `SampleKey`, so that epochs differ, or by a bare index."""
    return isinstance(dataset, (ImageDataset, DerivedDataset, Bucketed, CachedLatents))
