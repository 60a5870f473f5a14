"""The order of an epoch: a pure function of (seed, epoch, position, rank, world), so that a run can go on anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ldm import distributed
from ldm.data.core.transforms import Draw

__all__ = ["DrawSampler", "epoch_order"]


def epoch_order(
    num_items: int, seed: int, epoch: int, rank: int = 0, world: int = 1, shuffle: bool = True, even: bool = True
) -> np.ndarray:
    """Return the indices that one rank reads in an epoch: every world-th from the r-th on.

    What is left over is dropped, so that every rank has as many; unless `even`, the first ranks have one more.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_items) if shuffle else np.arange(num_items)
    if even:
        order = order[: num_items // world * world]
    return order[rank::world]


class DrawSampler(Sampler):
    """Return the `Draw`s of this rank in an epoch, or bare indices with `bare`; the first `start` are left out.

    `evaluation` reads every item once, in order, and draws the same augmentations every time. Rank and world are those
    of the process group at the time of iteration.
    """

    def __init__(
        self, num_items: int, seed: int = 0, shuffle: bool = True, evaluation: bool = False, bare: bool = False
    ) -> None:
        self.num_items, self.seed, self.bare = num_items, seed, bare
        self.shuffle, self.evaluation = shuffle and not evaluation, evaluation
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless the sampler is in it already."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        rank, world = distributed.rank(), distributed.world_size()
        return len(range(rank, self.num_items, world)) if self.evaluation else self.num_items // world

    def __iter__(self) -> Iterator[Draw | int]:
        rank, world = distributed.rank(), distributed.world_size()
        epoch = 0 if self.evaluation else self.epoch
        order = epoch_order(self.num_items, self.seed, epoch, rank, world, self.shuffle, even=not self.evaluation)
        for index in order[self.start :].tolist():
            yield index if self.bare else Draw(index, epoch, self.seed)
