"""The order of an epoch: a pure function of (seed, epoch, position, rank, world), so that a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset, Sampler

from ldm import distributed
from ldm.data.core.data_errors import DataErrors
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError

__all__ = ["EpochSampler", "ResumableSampler", "Stream", "epoch_order"]


def epoch_order(
    num_items: int, seed: int, epoch: int, rank: int = 0, world: int = 1, shuffle: bool = True, even: bool = True
) -> np.ndarray:
    """Return the indices that one rank reads in an epoch: every world-th, from the rank-th on.

    even: drop the remainder, so that all ranks have the same number; otherwise the first ranks have one more.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_items) if shuffle else np.arange(num_items)
    if even:
        order = order[: num_items // world * world]
    return order[rank::world]


class ResumableSampler(Sampler):
    """A sampler that starts at sample `start` (of this rank) of any `epoch`.

    evaluation: read every item once, in order, with the same random numbers every time. Rank and world size are those
    of the process group when an iteration begins.
    """

    length_is_known = True

    def __init__(self, seed: int = 0, shuffle: bool = True, evaluation: bool = False) -> None:
        self.seed, self.shuffle, self.evaluation = seed, shuffle and not evaluation, evaluation
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless the sampler is in it already."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def check(self) -> None:
        """Raise UserError where an iteration would have nothing to read; called before workers start."""

    def empty_error(self) -> UserError | None:
        """Return the error of an evaluation that could read nothing, None if that is none."""
        return None


@runtime_checkable
class Stream(Protocol):
    """An iterable data set whose samples a `ResumableSampler` reads in the main process and workers decode."""

    errors: DataErrors

    def sampler(self, batch_size: int, seed: int, shuffle: bool, evaluation: bool) -> ResumableSampler:
        """Make the sampler that reads undecoded samples, in the order of an epoch."""

    def decoder(self, evaluation: bool) -> Dataset:
        """Make the data set, with `__getitems__`, that decodes a batch of them."""


class EpochSampler(ResumableSampler):
    """Return the `SampleKey`s of this rank in an epoch of a map-style data set.

    bare: return indices instead, for data sets that take no keys.
    """

    def __init__(self, num_items: int, bare: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_items, self.bare = num_items, bare

    def __len__(self) -> int:
        rank, world = distributed.rank(), distributed.world_size()
        return len(range(rank, self.num_items, world)) if self.evaluation else self.num_items // world

    def __iter__(self) -> Iterator[SampleKey | int]:
        rank, world = distributed.rank(), distributed.world_size()
        epoch = 0 if self.evaluation else self.epoch
        order = epoch_order(self.num_items, self.seed, epoch, rank, world, self.shuffle, even=not self.evaluation)
        for index in order[self.start :].tolist():
            yield index if self.bare else SampleKey(index, epoch, self.seed)
