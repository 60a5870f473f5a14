"""Data sets made from another one: the same items with further keys that are drawn for each picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.data.core.base import ImageDataset
from ldm.data.core.transforms import Draw
from ldm.errors import UserError

__all__ = ["DerivedDataset", "source_of", "takes_draws"]


class DerivedDataset(Dataset, ABC):
    """Serve the items of a map-style data set with further keys; a subclass writes `_derive(image, rng)`.

    What is drawn is a function of the `Draw` of an item, as in `ImageDataset`, and differs between epochs even over
    data sets that repeat themselves. `stream` keeps the draws of a subclass apart from those of `dataset`. Raises
    UserError for streams.
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
        """Return the data set that reads the pictures, through all wrappers."""
        return self.dataset.source if isinstance(self.dataset, DerivedDataset) else self.dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | Draw) -> dict[str, Any]:
        draw = index if isinstance(index, Draw) else Draw(int(index))
        item = self.dataset[draw if takes_draws(self.dataset) else draw.index]
        if "image" not in item:
            raise UserError(f"{type(self).__name__}: the items have no 'image', they have {', '.join(item)}")
        rng = np.random.default_rng([draw.seed, draw.epoch, draw.index, self.stream])
        return {**item, **self._derive(item["image"], rng)}

    @abstractmethod
    def _derive(self, image: torch.Tensor, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        """Return the further keys of a picture (C, H, W) in [-1, 1]."""


def source_of(dataset: Dataset | None) -> Dataset | None:
    """Return the data set that reads the pictures: the same unless it is derived from another one."""
    return dataset.source if isinstance(dataset, DerivedDataset) else dataset


def takes_draws(dataset: Dataset) -> bool:
    """Return whether items are asked for by a `Draw`, so that epochs differ, or by a bare index."""
    return isinstance(dataset, (ImageDataset, DerivedDataset))
