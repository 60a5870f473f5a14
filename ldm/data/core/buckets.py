"""Training images in their own shapes: sizes of about one area, one size a batch, nothing cropped but a margin.

Each image has the size whose ratio of sides is nearest to its own (NovelAI's "aspect ratio bucketing"). An epoch gives
every image; batches of a size are filled up with images of the same size that come a second time.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from torch.utils.data import Dataset

from ldm import distributed
from ldm.bounds import Count, Ge
from ldm.data.core.base import Contents, ImageDataset
from ldm.data.core.sampler import ResumableSampler
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError

__all__ = ["Bucketed", "BucketSampler", "bucket_sizes", "grouped_order"]

_log = logging.getLogger(__name__)
Size = tuple[int, int]  # height, width


def bucket_sizes(height: int, width: int, multiple: int, longest: float) -> list[Size]:
    """List sizes of about the area of height x width, from upright to oblong, with sides that are multiples.

    longest: largest ratio of the sides. UserError if height or width is no multiple.
    """
    if height % multiple or width % multiple:
        raise UserError(f"Bucketed: size {height}x{width} must be multiples of `multiple`, {multiple}")
    area, sizes = height * width, {(height, width)}
    for side in range(multiple, math.isqrt(int(area * longest)) + 1, multiple):
        other = round(area / side / multiple) * multiple
        if other and max(side, other) <= longest * min(side, other):
            sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


class Bucketed(Dataset):
    """Give the images of a data set in the shapes nearest to their own, for training.

    Sizes are made of the area of the data set's own `size`, which a validation set keeps. All images are opened once,
    for their sizes. UserError for a data set that does not crop images itself.

    Args:
        dataset: with crop "center" or "random", and resize "size".
        multiple: of which the sides are multiples: those of the latents times what the network needs.
        longest: largest ratio of the sides; longer images are cropped to it.
        least: images that a size needs to be used; those of rarer sizes get the nearest other one.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        multiple: Count = 64,
        longest: Annotated[float, Ge(1)] = 2.0,
        least: Count = 1,
    ) -> None:
        transform = dataset.transform
        if transform.crop not in ("center", "random") or transform.shortest_side != 0:
            raise UserError("Bucketed: the data set inside needs crop: center or random, and resize: size")
        self.dataset = dataset
        sizes = bucket_sizes(transform.height, transform.width, multiple, longest)
        ratios = [dataset.aspect_ratio(file) for file in range(dataset.num_files)]
        longer = [file for file, ratio in enumerate(ratios) if max(ratio, 1 / ratio) > longest]
        if longer:
            said = "Bucketed: %d of %d images are longer than %g:1 and are cropped to it, the first is %s"
            _log.warning(said, len(longer), len(ratios), longest, dataset.names[longer[0]])
        kept, buckets = _nearest(ratios, sizes, least)
        self.sizes = [sizes[i] for i in kept]
        self._buckets = buckets  # of each file, (N,)
        self._views = [_with_size(dataset, size) for size in self.sizes]
        counts = np.bincount(buckets, minlength=len(kept))
        listed = ", ".join(f"{h}x{w}: {n}" for (h, w), n in zip(self.sizes, counts, strict=True))
        _log.info("buckets (height x width: images): %s", listed)

    @property
    def source(self) -> Dataset:
        """Return the data set that reads the images."""
        return self.dataset

    @property
    def contents(self) -> Contents:
        """Return what the data set consists of."""
        return self.dataset.contents

    @property
    def buckets(self) -> np.ndarray:
        """Return the number of the size of each item, (N,)."""
        return np.tile(self._buckets, self.dataset.repeats)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | SampleKey) -> dict[str, Any]:
        key = index if isinstance(index, SampleKey) else SampleKey(int(index))
        if not 0 <= key.index < len(self):
            raise IndexError(key.index)
        # Of the item and not of the file: what replaces an unreadable file has to fit into its batch.
        return self._views[self._buckets[key.index % self.dataset.num_files]][key]


def _nearest(ratios: list[float], sizes: list[Size], least: int) -> tuple[list[int], np.ndarray]:
    """Return the sizes that are used, and which of them each image has: that with the nearest log of the ratio."""
    wanted = np.log(ratios)[:, None]
    logs = np.log([width / height for height, width in sizes])
    kept = list(range(len(sizes)))
    while True:
        buckets = np.abs(wanted - logs[kept]).argmin(1)
        counts = np.bincount(buckets, minlength=len(kept))
        used = [i for i, n in zip(kept, counts, strict=True) if n]
        rarest = counts[counts > 0].min()
        if rarest >= least or len(used) == 1:
            kept = used
            return kept, np.abs(wanted - logs[kept]).argmin(1)
        kept.pop(int(np.flatnonzero(counts == rarest)[0]))


def _with_size(dataset: ImageDataset, size: Size) -> ImageDataset:
    """Return the same data set, of which everything but the size is shared."""
    view = copy.copy(dataset)
    view.transform = copy.copy(dataset.transform)
    view.transform.height, view.transform.width = size
    return view


def grouped_order(groups: np.ndarray, batch: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """Return the batches of an epoch, (number, batch) positions in `groups`, each of one group.

    Every position is there; incomplete batches are filled up from the beginning of their group.
    """
    rng = np.random.default_rng([seed, epoch])
    batches = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        members = rng.permutation(members) if shuffle else members
        batches.append(np.resize(members, (-(-len(members) // batch), batch)))
    order = np.concatenate(batches)
    return order[rng.permutation(len(order))] if shuffle else order


class BucketSampler(ResumableSampler):
    """Return the `SampleKey`s of this rank: steps of one size, the same for any number of ranks and of batches a step.

    UserError, at `check`, for a size with fewer images than a step, which would give them too often.

    Args:
        batch_size: of this rank.
        accumulate: batches of a step.
    """

    def __init__(self, dataset: Bucketed, batch_size: int, accumulate: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.evaluation:
            raise UserError(
                "Bucketed: an evaluation gives each image once, in one size; name the data set inside of it there"
            )
        self.groups, self.sizes, self.share = dataset.buckets, dataset.sizes, batch_size * accumulate

    def check(self) -> None:
        """Raise UserError if a size has fewer images than a step."""
        counts, batch = np.bincount(self.groups), self.share * distributed.world_size()
        if (fewest := int(counts.min())) < batch:
            height, width = self.sizes[int(counts.argmin())]
            raise UserError(
                f"data.params.train: {fewest} images of the size {height}x{width} do not fill a batch of {batch}; set "
                f"least: {batch} of Bucketed, which gives them a nearer size, or lower batch_size"
            )

    def __len__(self) -> int:
        return self.share * len(self._order(0))

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._order(self.epoch)[:, distributed.rank() :: distributed.world_size()]
        for index in order.flatten()[self.start :].tolist():
            yield SampleKey(index, self.epoch, self.seed)

    def _order(self, epoch: int) -> np.ndarray:
        return grouped_order(self.groups, self.share * distributed.world_size(), self.seed, epoch, self.shuffle)
