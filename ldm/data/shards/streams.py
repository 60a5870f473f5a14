"""The order of a stream: a pure function of (seed, epoch, position), for any number of ranks and workers.

Position p of a training epoch comes from lane p mod L: each pass over the shards deals them anew to the L lanes, and
each lane shuffles its samples in a buffer of its own. Rank r of W takes the positions p = r mod W; it reads the lanes
in which they lie, one in gcd(L, W), and leaves out undecoded what others take. A stream of unknown length, and every
evaluation, is a single lane that all ranks read. Undecoded samples are read in one thread per rank, ahead of the
workers of the loader, which only decode; so their number changes nothing.

An unreadable sample in training is replaced by the next readable one of its group of four in the lane, the same for
any number of ranks; if there is none, by a neighbour in the batch. In evaluation it is left out.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from math import gcd
from threading import current_thread
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import Sampler

from ldm import distributed
from ldm.data.core.transforms import Draw
from ldm.data.shards.shards import Sample, Shards
from ldm.errors import UserError

__all__ = ["Decoder", "StreamItem", "StreamSampler", "read_ahead"]

_GROUP = 4  # samples that replace each other; batches carry few beyond their own, since they hold most of each group
_AHEAD = 32  # samples that are read at once, while those before are consumed
_READ_AHEAD = "read-ahead"  # name of the thread that does
_log = logging.getLogger(__name__)
T = TypeVar("T")


class StreamItem(NamedTuple):
    """Hold the sample of a position, undecoded, and those that replace it if it is unreadable."""

    draw: Draw
    samples: tuple[Sample, ...]


class _Share(NamedTuple):
    """Say what is read: an epoch from the `start`-th sample of a rank on. Fixed when an iteration begins."""

    epoch: int
    start: int
    rank: int
    world: int


class StreamSampler(Sampler):
    """Return the `StreamItem`s of this rank in an epoch; the first `start` are left out.

    `evaluation` reads once, in order, with the same augmentations every time. Rank and world are those of the process
    group at the time of iteration.
    """

    def __init__(
        self, stream: Shards, batch_size: int, seed: int = 0, shuffle: bool = True, evaluation: bool = False
    ) -> None:
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.shuffle, self.evaluation = shuffle and not evaluation, evaluation
        self.epoch, self.start = 0, 0
        self._is_checked = False

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless the sampler is in it already."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    @property
    def is_endless(self) -> bool:
        """Return whether the stream goes on until an epoch is full, rather than once through the shards."""
        return self.shuffle and self.stream.samples_per_epoch is not None

    def __len__(self) -> int:
        if not self.is_endless:
            raise TypeError("the length of this stream is not known")
        return max(self.batch_size, self.stream.samples_per_epoch // distributed.world_size())

    def __iter__(self) -> Iterator[StreamItem]:
        import webdataset  # noqa: F401  # here, since a worker that is forked during an import never finishes it

        share = _Share(0 if self.evaluation else self.epoch, self.start, distributed.rank(), distributed.world_size())
        return read_ahead(self._endless(share, len(self)) if self.is_endless else self._once(share), _AHEAD)

    def check(self) -> None:
        """Open the stream, once, before workers start. UserError where some rank would have nothing or run dry."""
        rank, world = distributed.rank(), distributed.world_size()
        if self._is_checked:
            return
        first, several = self.stream.shards[0], world > 1 and not self.evaluation
        if several and not self.is_endless and self.stream.is_remote:  # one that fails for a single rank is waited for
            raise UserError(
                f"{first}: a stream of remote shards that {world} processes train on needs samples_per_epoch, the "
                "number of samples after which an epoch ends"
            )
        needed = world if self.evaluation else 1
        found = sum(1 for _ in islice(self.stream.samples(self.stream.shards), needed))
        if not found:
            raise self.stream.nothing_readable()
        if found < needed:
            raise UserError(f"{first}: {found} samples cannot be shared out among {world} processes; evaluate on fewer")
        if rank == 0 and several and (not self.is_endless or self.stream.lanes % world):
            hint = f"lanes to a multiple of {world}" if self.is_endless else "samples_per_epoch"
            _log.warning("%s: several processes read the same shards; set %s to avoid it", first, hint)
        self._is_checked = True

    def _endless(self, share: _Share, length: int) -> Iterator[StreamItem]:
        rank, world, num_lanes = share.rank, share.world, self.stream.lanes
        step = gcd(num_lanes, world)
        own = range(rank % step, num_lanes, step)
        lanes = {lane: self._lane(share.epoch, lane, num_lanes, count()) for lane in own}
        for position in range(rank % step, length * world, step):
            samples = next(lanes[position % num_lanes])
            if position % world == rank and position >= share.start * world:
                yield StreamItem(Draw(position, share.epoch, self.seed), samples)

    def _once(self, share: _Share) -> Iterator[StreamItem]:
        """Return every world-th sample; of training, only from rounds in which there is one for each rank."""
        rank, world = share.rank, share.world
        for number, round_ in enumerate(_grouped(self._lane(share.epoch, 0, 1, range(1)), world)):
            if number >= share.start and (len(round_) == world or (self.evaluation and rank < len(round_))):
                yield StreamItem(Draw(number * world + rank, share.epoch, self.seed), round_[rank])

    def _lane(self, epoch: int, lane: int, num_lanes: int, passes: Iterable[int]) -> Iterator[tuple[Sample, ...]]:
        """Return each sample of a lane with those that can replace it."""
        from webdataset.filters import shuffle

        barren: set[str] = set()
        size = -(-self.stream.buffer // num_lanes)
        for number in passes:
            shards, samples = self.stream.shards, self.stream.samples(self.stream.shards)
            if self.shuffle:
                key = f"{self.seed} {epoch} {number}"
                shards = random.Random(key).sample(shards, len(shards))[lane::num_lanes]
                mixed = shuffle(size, initial=size, rng=random.Random(f"{key} {lane}"))
                samples = mixed(self.stream.samples(shards))
            barren |= set(shards)
            for group in _grouped(samples, 1 if self.evaluation else _GROUP):
                barren.clear()
                for i in range(len(group)):
                    yield (*group[i:], *group[:i])
            if len(barren) == len(self.stream.shards):
                raise self.stream.nothing_readable()


class Decoder:
    """Decode the items of a `StreamSampler`; what the workers of a loader do."""

    def __init__(self, stream: Shards, evaluation: bool = False) -> None:
        self.stream, self.evaluation = stream, evaluation

    def __getitems__(self, wanted: Sequence[StreamItem]) -> list[dict[str, Any]]:
        """Decode a batch, in evaluation without what is unreadable. UserError where a training batch has nothing."""
        items = [self._decoded(item) for item in wanted]
        readable = [item for item in items if item is not None]
        if self.evaluation:
            return readable
        if not readable:
            raise self.stream.nothing_readable()
        neighbours = [[item for item in items[i:] + items[:i] if item is not None] for i in range(len(items))]
        return [found[0] for found in neighbours]

    def _decoded(self, item: StreamItem) -> dict[str, Any] | None:
        candidates = (self.stream.read(sample, item.draw) for sample in item.samples)
        return next((found for found in candidates if found is not None), None)


def _grouped(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    iterator = iter(values)
    while group := tuple(islice(iterator, size)):
        yield group


def read_ahead(values: Iterable[T], size: int) -> Iterator[T]:
    """Run an iterator in a thread, one group of values ahead; its errors come out here."""
    groups = _grouped(values, size)
    thread = ThreadPoolExecutor(1, _READ_AHEAD)
    try:
        coming = thread.submit(next, groups, ())
        while group := coming.result():
            coming = thread.submit(next, groups, ())
            yield from group
    finally:  # a thread cannot wait for itself, and the garbage collector may close this generator in any thread
        thread.shutdown(wait=not current_thread().name.startswith(_READ_AHEAD), cancel_futures=True)
