"""WebDataset shards: `IndexedShards` at random from local tars, `Shards` as a stream from anywhere.

The order of a stream, and who of several processes reads what, is in `ldm.data.shards.streams`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ldm.bounds import Count, Fraction, Natural
from ldm.data.core.base import ImageDataset
from ldm.data.core.decoding import Picture
from ldm.data.core.tally import Tally
from ldm.data.core.transforms import UNREADABLE, Draw, ImageTransform
from ldm.data.shards.tar_samples import ABSENT, Fields, Member, expand_urls, index_tar, is_remote
from ldm.errors import UserError

__all__ = ["IndexedShards", "Sample", "Shards"]

_SLOTS = 1 << 16  # in which bad samples of a stream, whose number is unknown, are noted by a hash of their name
_MOST_LANES = 8  # that are opened at once unless asked for
Sample = dict[str, Any]  # the undecoded files of a sample by extension, `__key__` and `__url__`


class IndexedShards(ImageDataset):
    """Read samples of local, uncompressed tars in any order; their headers are listed once, at the start.

    urls: tars, folders of tars, globs, or patterns as `train-{0000..0003}.tar`. fields: see `tar_samples`, by default
    {caption: txt}. For the other options see `ImageDataset`. Samples that lack a file, and what is lost of a damaged
    tar (as one), count as unreadable. Raises UserError for absent shards, and where no sample has all fields.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        size: Count | Sequence[Count],
        fields: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.fields = Fields(fields)
        self._columns = {extension: i for i, extension in enumerate(sorted(self.fields.extensions), start=1)}
        self._shards = expand_urls(urls)
        keys, places = self._list_samples(str(urls))
        kept = self._index(keys, str(urls))
        self._places = np.array(places, dtype=np.int64)[kept]  # (files, 1 + columns, shard, start, size)
        shards = [self._shards[shard] for shard in self._places[:, 0, 0]]
        self.names = [f"{shard}: {key}" for shard, key in zip(shards, self.names, strict=True)]

    def _list_samples(self, source: str) -> tuple[list[str], list[list[tuple[int, int, int]]]]:
        """Return the names of all samples and (shard, start, size) of their files. UserError if none is whole."""
        keys, places, problems, num_whole = [], [], [], 0
        for shard, path in enumerate(self._shards):
            samples, damage = index_tar(path)
            for key, members in samples.items():
                image = self.fields.image_of(list(members))
                if image is None and not members.keys() & self._columns.keys():
                    continue
                problem = self.fields.problem(list(members))
                num_whole += problem is None
                problems += [f"{path}: {key} {problem}"] if problem else []
                keys.append(key)
                places.append([(shard, *members.get(name, ABSENT)) for name in (image, *self._columns)])
            if damage:
                problems.append(f"{path}: {damage}")
                keys.append("what is left of it")
                places.append([(shard, *ABSENT)] * (1 + len(self._columns)))
        if not num_whole:
            raise UserError(f"{source}: no sample is whole; {problems[0] if problems else 'the shards are empty'}")
        return keys, places

    def _content(self, file: int, column: int) -> bytes:
        shard, start, size = self._places[file, column].tolist()
        return Member(start, size).read(self._shards[shard])

    def _read_image(self, file: int) -> Picture:
        return self.transform.open(self._content(file, 0))

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.fields.read(lambda extension: self._content(file, self._columns[extension]))


class Shards(IterableDataset):
    """Stream samples of shards through the webdataset library, also from http:, s3: or pipe: sources.

    Items, `fields` and the options of pictures are as for `IndexedShards`. `samples_per_epoch`, over all ranks, makes
    the training stream endless, reshuffled at each pass, and divides it into `lanes` (by default the largest power of
    two up to 8 and the number of shards), which ranks share; so it is wanted for large data and for remote shards.
    Another number of lanes is another order. `buffer` samples, over all lanes, are shuffled among each other, as they
    are in the tar.

    Iterated by itself it gives all readable samples once, in order. Whether a remote source is tried again is its
    handler's affair: that of http: tries 30 times, a pipe: as its command says.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        size: Count | Sequence[Count],
        fields: Mapping[str, str] | None = None,
        crop: str = "center",
        resize: Count | Literal["size", "none"] | None = "size",
        flip: Fraction = 0.0,
        channels: Count = 3,
        interpolation: str = "bicubic",
        value_range: Sequence[float] | None = None,
        samples_per_epoch: Count | None = None,
        buffer: Natural = 1000,
        lanes: Count | None = None,
    ) -> None:
        self.shards = expand_urls(urls)
        self.transform = ImageTransform(size, crop, resize, flip, channels, interpolation, value_range)
        self.fields, self.samples_per_epoch, self.buffer = Fields(fields), samples_per_epoch, max(1, buffer)
        self.lanes = 1 << (min(len(self.shards), _MOST_LANES).bit_length() - 1) if lanes is None else lanes
        if not 1 <= self.lanes <= len(self.shards):
            raise UserError(f"{urls}: lanes={lanes} must be 1 to {len(self.shards)}, the number of shards")
        self.tally = Tally(_SLOTS)

    @property
    def num_unreadable(self) -> int:
        """Return how many samples and shards were found unreadable so far, in all workers of this machine."""
        return self.tally.num_unreadable

    @property
    def num_empty(self) -> int:
        """Return how many samples were found to have an empty caption so far, in all workers of this machine."""
        return self.tally.num_empty

    @property
    def is_remote(self) -> bool:
        """Return whether any shard is not a local file."""
        return any(is_remote(shard) for shard in self.shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        num_items = 0
        for position, sample in islice(enumerate(self.samples(self.shards)), worker, None, num_workers):
            item = self.read(sample, Draw(position))
            if item is not None:
                num_items += 1
                yield item
        if not num_items and worker == 0:
            raise self.nothing_readable()

    def nothing_readable(self) -> UserError:
        """Make the error for a stream, or a whole batch of it, that gave nothing."""
        first = "; ".join(self.tally.first()) or "the shards hold none of the files asked for"
        return UserError(f"{self.shards[0]}: no sample of the {len(self.shards)} shards can be read; {first}")

    def samples(self, shards: Sequence[str]) -> Iterator[Sample]:
        """Return the undecoded samples of some shards in order; damaged shards are counted and left at the damage."""
        from webdataset.tariterators import tarfile_samples

        for shard in shards:
            problems: list[Exception] = []
            handler = partial(_note, problems)
            yield from tarfile_samples([{"url": shard}], handler=handler, select_files=self.fields.is_needed)
            if problems:  # told here, since the library takes what a handler raises for another problem
                self._skip(f"{shard}: what is left of it", OSError(_text(problems[0], shard)))

    def read(self, sample: Sample, draw: Draw) -> dict[str, Any] | None:
        """Decode a sample, or return None if it is unreadable. Raises UserError if too many are."""
        name, files = _name(sample), [key for key in sample if not key.startswith("__")]
        try:
            if (problem := self.fields.problem(files)) is not None:
                raise ValueError(problem)
            image = self.transform.open(sample[self.fields.image_of(files)])
            fields = self.fields.read(sample.__getitem__)
        except UNREADABLE as error:
            self._skip(name, error)
            return None
        self.tally.note_read()
        if fields.get("caption") == "":
            self.tally.note_empty(_slot(name), name)
        if self.transform.enlarges(image):
            self.tally.enlarge(name, image, self.transform)
        return {"image": self.transform(image, draw.generator()), **fields}

    def _skip(self, name: str, error: Exception) -> None:
        self.tally.skip(_slot(name), name, error)

    def texts(self, key: str = "caption") -> Iterator[str]:
        """Read the texts under a key, for a tokenizer to be trained on."""
        for sample in self.samples(self.shards):
            try:
                value = self.fields.read(sample.__getitem__).get(key)
            except (*UNREADABLE, KeyError) as error:
                self._skip(_name(sample), error)
                continue
            if not isinstance(value, str):
                raise UserError(f"{_name(sample)} has no text under {key!r}")
            yield value


def _slot(name: str) -> int:
    return crc32(name.encode()) % _SLOTS


def _name(sample: Sample) -> str:
    return f"{sample['__url__']}: {sample['__key__']}"


def _note(problems: list[Exception], error: Exception) -> bool:
    """Keep an error that the library reports, and let it go on."""
    problems.append(error)
    return True


def _text(error: Exception, shard: str) -> str:
    """Say what is wrong with a shard, without the objects that the library adds to the arguments of an error."""
    return " ".join(str(arg) for arg in error.args if isinstance(arg, (str, int)) and arg != shard) or repr(error)
