"""The order of a stream: a pure function of (seed, epoch, position), for any number of ranks and workers.

Shards are split into L independent shuffle streams, reassigned in each pass over the shards; sample p of an epoch is
the next sample of stream p mod L. Rank r of W reads the streams that contain its positions r, r+W, ..., one in
gcd(L, W), and skips the samples of other ranks without decoding them. A stream of unknown length, and every evaluation,
is a single stream that all ranks read. One thread per rank reads undecoded samples ahead of the workers of the loader,
which only decode; their number therefore changes nothing.

In training an unreadable sample is replaced by the next readable one of its group of four in the stream, the same for
any number of ranks, or else by a neighbour in the batch. In evaluation it is left out.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from math import gcd
from threading import current_thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ldm import distributed
from ldm.data.core.sampler import ResumableSampler
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.data.shards.shards import Shards

__all__ = ["Sample", "StreamDecoder", "StreamItem", "StreamSampler", "read_ahead"]

_GROUP = 4  # samples that replace each other; batches carry few beyond their own, since they hold most of each group
_AHEAD = 32  # samples that are read at once, while those before are consumed
_READ_AHEAD = "read-ahead"  # name of the thread that does
_log = logging.getLogger(__name__)
T = TypeVar("T")
Sample = dict[str, Any]  # the undecoded files of a sample by extension, `__key__` and `__url__`


class StreamItem(NamedTuple):
    """The undecoded sample of a position, first, and those that replace it if it is unreadable."""

    key: SampleKey
    samples: tuple[Sample, ...]


class _EpochPart(NamedTuple):
    """The samples of one rank in an epoch, from its `start`-th on; fixed when an iteration begins."""

    epoch: int
    start: int
    rank: int
    world: int


class StreamSampler(ResumableSampler):
    """Return the `StreamItem`s of this rank in an epoch of `Shards`."""

    def __init__(self, stream: Shards, batch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stream, self.batch_size = stream, batch_size
        self._is_checked = False

    @property
    def length_is_known(self) -> bool:
        """Return whether the stream continues until an epoch is full, rather than once through the shards."""
        return self.shuffle and self.stream.samples_per_epoch is not None

    def __len__(self) -> int:
        if not self.length_is_known:
            raise TypeError("the length of this stream is not known")
        return max(self.batch_size, self.stream.samples_per_epoch // distributed.world_size())

    def __iter__(self) -> Iterator[StreamItem]:
        import webdataset  # noqa: F401  # here, since a worker that is forked during an import never finishes it

        epoch = 0 if self.evaluation else self.epoch
        part = _EpochPart(epoch, self.start, distributed.rank(), distributed.world_size())
        return read_ahead(self._endless(part, len(self)) if self.length_is_known else self._once(part), _AHEAD)

    def check(self) -> None:
        """Open the stream once. Raises UserError where some rank would have nothing to read, or run out of it."""
        rank, world = distributed.rank(), distributed.world_size()
        if self._is_checked:
            return
        first, several = self.stream.shards[0], world > 1 and not self.evaluation
        if several and not self.length_is_known and self.stream.is_remote:  # one failing rank would stop the others
            raise UserError(
                f"{first}: a stream of remote shards that {world} processes train on needs samples_per_epoch, the "
                "number of samples after which an epoch ends"
            )
        needed = world if self.evaluation else 1
        found = sum(1 for _ in islice(self.stream.samples(self.stream.shards), needed))
        if not found:
            raise self.stream.nothing_readable()
        if found < needed:
            raise UserError(f"{first}: {found} samples cannot be divided among {world} processes; evaluate on fewer")
        if rank == 0 and several and (not self.length_is_known or self.stream.shuffle_streams % world):
            hint = f"shuffle_streams to a multiple of {world}" if self.length_is_known else "samples_per_epoch"
            _log.warning("%s: several processes read the same shards; set %s to avoid it", first, hint)
        self._is_checked = True

    def empty_error(self) -> UserError | None:
        """Return the error of an evaluation without a readable sample; training raises it for a batch."""
        return self.stream.nothing_readable() if self.evaluation else None

    def _endless(self, part: _EpochPart, length: int) -> Iterator[StreamItem]:
        rank, world, num_streams = part.rank, part.world, self.stream.shuffle_streams
        step = gcd(num_streams, world)
        own = range(rank % step, num_streams, step)
        streams = {number: self._shuffled(part.epoch, number, num_streams, count()) for number in own}
        for position in range(rank % step, length * world, step):
            samples = next(streams[position % num_streams])
            if position % world == rank and position >= part.start * world:
                yield StreamItem(SampleKey(position, part.epoch, self.seed), samples)

    def _once(self, part: _EpochPart) -> Iterator[StreamItem]:
        """Return every world-th sample; in training, only from rounds in which every rank has one."""
        rank, world = part.rank, part.world
        for number, round_ in enumerate(_grouped(self._shuffled(part.epoch, 0, 1, range(1)), world)):
            if number >= part.start and (len(round_) == world or (self.evaluation and rank < len(round_))):
                yield StreamItem(SampleKey(number * world + rank, part.epoch, self.seed), round_[rank])

    def _shuffled(
        self, epoch: int, stream: int, num_streams: int, passes: Iterable[int]
    ) -> Iterator[tuple[Sample, ...]]:
        """Return each sample of a shuffle stream with those that can replace it."""
        from webdataset.filters import shuffle

        empty_shards: set[str] = set()
        size = -(-self.stream.buffer // num_streams)
        for number in passes:
            shards, samples = self.stream.shards, self.stream.samples(self.stream.shards)
            if self.shuffle:
                key = f"{self.seed} {epoch} {number}"
                shards = random.Random(key).sample(shards, len(shards))[stream::num_streams]
                mixed = shuffle(size, initial=size, rng=random.Random(f"{key} {stream}"))
                samples = mixed(self.stream.samples(shards))
            empty_shards |= set(shards)
            for group in _grouped(samples, 1 if self.evaluation else _GROUP):
                empty_shards.clear()
                for i in range(len(group)):
                    yield (*group[i:], *group[:i])
            if len(empty_shards) == len(self.stream.shards):
                raise self.stream.nothing_readable()


class StreamDecoder:
    """Decode the items of a `StreamSampler`, in the workers of a loader."""

    def __init__(self, stream: Shards, evaluation: bool = False) -> None:
        self.stream, self.evaluation = stream, evaluation

    def __getitems__(self, wanted: Sequence[StreamItem]) -> list[dict[str, Any]]:
        """Decode a batch, in evaluation without its unreadable samples. UserError for a training batch without any."""
        items = [self._decoded(item) for item in wanted]
        readable = [item for item in items if item is not None]
        if self.evaluation:
            return readable
        if not readable:
            raise self.stream.nothing_readable()
        neighbours = [[item for item in items[i:] + items[:i] if item is not None] for i in range(len(items))]
        return [found[0] for found in neighbours]

    def _decoded(self, item: StreamItem) -> dict[str, Any] | None:
        candidates = (self.stream.read(sample, item.key) for sample in item.samples)
        return next((found for found in candidates if found is not None), None)


def _grouped(values: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    iterator = iter(values)
    while group := tuple(islice(iterator, size)):
        yield group


def read_ahead(values: Iterable[T], size: int) -> Iterator[T]:
    """Run an iterator in a thread, one group of values ahead; its errors are raised here."""
    groups = _grouped(values, size)
    thread = ThreadPoolExecutor(1, _READ_AHEAD)
    try:
        coming = thread.submit(next, groups, ())
        while group := coming.result():
            coming = thread.submit(next, groups, ())
            yield from group
    finally:  # a thread cannot wait for itself, and the garbage collector may close this generator in any thread
        thread.shutdown(wait=not current_thread().name.startswith(_READ_AHEAD), cancel_futures=True)
