"""WebDataset shards: `IndexedShards` at random from local tars, `Shards` as a stream from anywhere.

A stream is divided among ranks and workers, by shard if there are enough of them, else sample by sample. Its order is a
function of (seed, epoch); an epoch in evaluation shows every sample exactly once.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ldm.data.base import ImageDataset, Tally
from ldm.data.decoding import Picture
from ldm.data.tar_samples import Fields, Member, expand_urls, index_tar
from ldm.data.transforms import UNREADABLE, ImageTransform
from ldm.errors import UserError

__all__ = ["IndexedShards", "Shards", "StreamPlan"]

_SLOTS = 1 << 16  # in which unreadable samples of a stream, whose number is unknown, are noted by a hash of their name
_Sample = dict[str, Any]


class IndexedShards(ImageDataset):
    """Read samples of local, uncompressed tars in any order; their headers are listed once, at the start.

    urls: tars, folders of tars, globs, or patterns as `train-{0000..0003}.tar`. fields: see `tar_samples`, by default
    {caption: txt}. For the other options see `ImageDataset`. Raises UserError for absent shards and fields.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        size: int | Sequence[int],
        fields: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.fields = Fields(fields)
        self._columns = {extension: i for i, extension in enumerate(sorted(self.fields.extensions), start=1)}
        self._shards = expand_urls(urls)
        keys, places, found = [], [], set()
        for shard, path in enumerate(self._shards):
            for key, members in index_tar(path):
                found |= set(members)
                image = self.fields.image_of(list(members))
                if image is not None:
                    self.fields.check(f"{path}: {key}", list(members))
                    keys.append(key)
                    places.append([(shard, *members[extension]) for extension in (image, *self._columns)])
        if not keys:
            raise UserError(f"{urls}: no sample has a picture; there are {', '.join(sorted(found)) or 'no files'}")
        kept = self._index(keys, str(urls))
        self._places = np.array(places, dtype=np.int64)[kept]  # (files, 1 + columns, shard, start, size)
        shards = [self._shards[shard] for shard in self._places[:, 0, 0]]
        self.names = [f"{shard}: {key}" for shard, key in zip(shards, self.names, strict=True)]

    def _content(self, file: int, column: int) -> bytes:
        shard, start, size = self._places[file, column].tolist()
        return Member(start, size).read(self._shards[shard])

    def _read_image(self, file: int) -> Picture:
        return self.transform.open(self._content(file, 0))

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.fields.read(self.names[file], lambda extension: self._content(file, self._columns[extension]))


class StreamPlan(NamedTuple):
    """Who reads a stream and how; `batch_size` is that of each worker's batches, to leave out those of the past."""

    seed: int = 0
    shuffle: bool = False
    rank: int = 0
    world: int = 1
    batch_size: int = 1


class Shards(IterableDataset):
    """Stream samples of shards through the webdataset library, also from http:, s3: or pipe: sources.

    Items, `fields` and the options of pictures are as for `IndexedShards`. `samples_per_epoch`, over all ranks, makes
    the training stream endless, reshuffled at each pass; training on several ranks needs it, so that none runs dry
    before the others. `buffer` samples per worker are shuffled among each other, as they are in the tar.

    Without a plan all samples come once, in order. On several ranks an evaluation repeats the first sample where the
    number of samples cannot be divided evenly.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        size: int | Sequence[int],
        fields: Mapping[str, str] | None = None,
        crop: str = "center",
        resize: int | Literal["size", "none"] | None = "size",
        flip: float = 0.0,
        channels: int = 3,
        interpolation: str = "bicubic",
        value_range: Sequence[float] | None = None,
        samples_per_epoch: int | None = None,
        buffer: int = 1000,
    ) -> None:
        self.shards = expand_urls(urls)
        self.transform = ImageTransform(size, crop, resize, flip, channels, interpolation, value_range)
        self.fields, self.samples_per_epoch, self.buffer = Fields(fields), samples_per_epoch, max(1, buffer)
        self.plan = StreamPlan()
        self._position = torch.zeros(2, dtype=torch.long).share_memory_()  # epoch, batches already seen
        self._tally = Tally(_SLOTS)

    @property
    def num_unreadable(self) -> int:
        """Give how many samples and shards were found unreadable so far, in all workers of this machine."""
        return self._tally.num_unreadable

    def planned(self, plan: StreamPlan) -> Shards:
        """Give the same stream under another plan, at its beginning."""
        stream = copy.copy(self)
        stream.plan, stream._position = plan, torch.zeros_like(self._position).share_memory_()
        return stream

    def join(self, rank: int, world: int) -> None:
        """Take the share of one of several ranks. Raises UserError if a training set could run dry on some of them."""
        if world > 1 and self.plan.shuffle and self.samples_per_epoch is None:
            raise UserError(
                f"{self.shards[0]}: a stream that {world} processes train on needs samples_per_epoch, the number of "
                "samples after which an epoch ends; or use ldm.data.shards.IndexedShards for local tars"
            )
        self.plan = self.plan._replace(rank=rank, world=world)

    def num_batches(self, world: int) -> int:
        """Give the length of an epoch in batches. Raises TypeError, as `len` does, if only reading can tell."""
        if self.samples_per_epoch is None or not self.plan.shuffle:
            raise TypeError("the length of this stream is not known")
        return max(1, self.samples_per_epoch // (self.plan.batch_size * world))

    @property
    def position(self) -> tuple[int, int]:
        """Give (epoch, batches left out) of the next iteration."""
        epoch, batches = self._position.tolist()
        return epoch, batches

    def set_position(self, epoch: int, batches: int = 0) -> None:
        """Start the next iteration, in this process and in workers, at a batch of an epoch."""
        self._position[0], self._position[1] = epoch, batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        epoch, batches = self.position
        worker = (worker + batches) % num_workers  # workers give batches in turn: the first one takes the next turn
        skipped = self.plan.batch_size * len(range(worker, batches, num_workers))
        part, num_parts = self.plan.rank * num_workers + worker, self.plan.world * num_workers
        endless = self.plan.shuffle and self.samples_per_epoch is not None
        for number in count() if endless else range(1):
            empty = True
            for sample in self._pass(epoch, number, part, num_parts):
                empty = False
                if skipped > 0:
                    skipped -= 1
                    continue
                item = self._item(sample, np.random.default_rng([self.plan.seed, epoch, number, _digest(sample)]))
                if item is not None:
                    yield item
            if empty and (endless or num_parts == 1):
                raise UserError(f"{self.shards[0]}: no sample in {len(self.shards)} shards has a picture")

    def _pass(self, epoch: int, number: int, part: int, num_parts: int) -> Iterator[_Sample]:
        """Give the undecoded samples of one worker in one pass over the shards."""
        shards = list(self.shards)
        if not self.plan.shuffle:
            return self._every(shards, part, num_parts, padded=self.plan.world > 1)
        random.Random(f"{self.plan.seed} {epoch} {number}").shuffle(shards)
        if len(shards) >= num_parts:
            samples = self._samples(shards[part::num_parts])
        else:
            samples = self._every(shards, part, num_parts, padded=False)
        return self._mixed(samples, random.Random(f"{self.plan.seed} {epoch} {number} {part}"))

    def _every(self, shards: Sequence[str], part: int, num_parts: int, padded: bool) -> Iterator[_Sample]:
        """Give every num_parts-th sample; `padded` makes all parts equally long."""
        first, total = None, 0
        for total, sample in enumerate(self._samples(shards), start=1):
            first = first or sample
            if (total - 1) % num_parts == part:
                yield sample
        if padded and first is not None and part >= total % num_parts > 0:
            yield first

    def _samples(self, shards: Sequence[str]) -> Iterator[_Sample]:
        from webdataset.tariterators import tarfile_samples

        sources = ({"url": shard} for shard in shards)
        for sample in tarfile_samples(sources, handler=self._note_failure, select_files=self.fields.is_needed):
            if self.fields.image_of(list(sample)) is not None:
                yield sample

    def _mixed(self, samples: Iterator[_Sample], rng: random.Random) -> Iterator[_Sample]:
        from webdataset.filters import shuffle

        return shuffle(self.buffer, initial=self.buffer, rng=rng)(samples)

    def _note_failure(self, error: Exception) -> bool:
        """Go on with the next shard, or member, after an error that the library reports."""
        *problem, shard = [str(arg) for arg in error.args if isinstance(arg, (str, int))] or [repr(error)]
        self._skip(f"{shard}: what is left of it", OSError(" ".join(problem)))
        return True

    def _skip(self, name: str, error: Exception) -> None:
        self._tally.skip(crc32(name.encode()) % _SLOTS, name, error)

    def _item(self, sample: _Sample, rng: np.random.Generator) -> dict[str, Any] | None:
        """Decode a sample, or return None if it is unreadable."""
        name, files = _name(sample), [key for key in sample if not key.startswith("__")]
        self.fields.check(name, files)
        try:
            image = self.transform.open(sample[self.fields.image_of(files)])
            fields = self.fields.read(name, sample.__getitem__)
        except UNREADABLE as error:
            self._skip(name, error)
            return None
        if self.transform.enlarges(image):
            self._tally.enlarge(name, image, self.transform)
        return {"image": self.transform(image, rng), **fields}

    def texts(self, key: str = "caption") -> Iterator[str]:
        """Read the texts under a key, for a tokenizer to be trained on."""
        for sample in self._samples(self.shards):
            value = self.fields.read(_name(sample), sample.__getitem__).get(key)
            if not isinstance(value, str):
                raise UserError(f"{_name(sample)} has no text under {key!r}")
            yield value


def _name(sample: _Sample) -> str:
    return f"{sample['__url__']}: {sample['__key__']}"


def _digest(sample: _Sample) -> int:
    return crc32(_name(sample).encode())
