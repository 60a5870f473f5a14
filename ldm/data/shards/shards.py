"""WebDataset shards: `IndexedShards` reads local tars in any order, `Shards` streams them from anywhere.

The order of a stream, and which process reads which sample, are in `ldm.data.shards.streams`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ldm.bounds import Count, Natural, Sides
from ldm.data.core.base import Contents, ImageDataset, ImageReader, contents_of_names
from ldm.data.core.data_errors import DataErrors
from ldm.data.core.decoding import DecodedImage
from ldm.data.core.transforms import UNREADABLE, SampleKey
from ldm.data.shards.streams import Sample, StreamDecoder, StreamSampler
from ldm.data.shards.tar_samples import ABSENT, Fields, FirstOfEach, Member, expand_urls, index_tar, is_remote
from ldm.errors import UserError

__all__ = ["IndexedShards", "Shards"]

_SLOTS = 1 << 16  # hashes of names under which bad samples are counted, since a stream has no list of its samples
_MAX_STREAMS = 8  # opened at once by default


class IndexedShards(ImageDataset):
    """Read samples of local, uncompressed tars in any order; their headers are listed once, at the start.

    Samples without one of the files, and the rest of a damaged tar (as one sample), count as unreadable. Raises
    UserError for absent shards, and where no sample has all fields.

    urls: tars, folders of tars, globs, or patterns such as `train-{0000..0003}.tar`. fields: see `tar_samples`, by
    default {caption: txt}. For the other options see `ImageDataset`.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        size: Sides,
        fields: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.fields = Fields(fields)
        self._columns = {extension: i for i, extension in enumerate(sorted(self.fields.extensions), start=1)}
        self._shards = expand_urls(urls)
        keys, members = self._list_samples(str(urls))
        kept = self._index(keys, str(urls))
        self._members = np.array(members, dtype=np.int64)[kept]  # (files, 1 + columns, 3): shard, start, size
        shards = [self._shards[shard] for shard in self._members[:, 0, 0]]
        self.names = [f"{shard}: {key}" for shard, key in zip(shards, self.names, strict=True)]

    @property
    def contents(self) -> Contents:
        """Return what the shards consist of; where they lie does not count."""
        folders = [f"{Path(shard).parent}/" for shard in self._shards]
        shards = self._members[:, 0, 0]
        return contents_of_names([name.removeprefix(folders[i]) for name, i in zip(self.names, shards, strict=True)])

    def _list_samples(self, source: str) -> tuple[list[str], list[list[tuple[int, int, int]]]]:
        """Return the names of all samples, and (shard, start, size) of their files. UserError if none is complete."""
        keys, found, problems, num_complete = [], [], [], 0
        for shard, path in enumerate(self._shards):
            samples, damage = index_tar(path)
            for key, members in samples.items():
                image = self.fields.image_of(list(members))
                if image is None and not members.keys() & self._columns.keys():
                    continue
                problem = self.fields.problem(list(members))
                num_complete += problem is None
                problems += [f"{path}: {key} {problem}"] if problem else []
                keys.append(key)
                found.append([(shard, *members.get(name, ABSENT)) for name in (image, *self._columns)])
            if damage:
                problems.append(f"{path}: {damage}")
                keys.append("the rest of it")
                found.append([(shard, *ABSENT)] * (1 + len(self._columns)))
        if not num_complete:
            raise UserError(f"{source}: no sample is complete; {problems[0] if problems else 'the shards are empty'}")
        return keys, found

    def _content(self, file: int, column: int) -> bytes:
        shard, start, size = self._members[file, column].tolist()
        return Member(start, size).read(self._shards[shard])

    def _read_image(self, file: int) -> DecodedImage:
        return self.transform.open(self._content(file, 0))

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return self.fields.read(lambda extension: self._content(file, self._columns[extension]), rng)


class Shards(ImageReader, IterableDataset):
    """Stream samples of shards by the webdataset library, also from http:, s3: or pipe: sources.

    Iterated directly it returns all readable samples once, in order. Whether a remote source is tried again depends on
    its handler: http: tries 30 times, pipe: does what its command does.

    Args:
        urls, fields: as for `IndexedShards`.
        samples_per_epoch: over all ranks. Makes the training stream endless, reshuffled in each pass over the shards;
            needed for remote shards on several ranks, and for data that is too large to be read once an epoch.
        buffer: the number of samples, over all streams, that are shuffled with each other.
        shuffle_streams: the number of streams into which the shards of an endless stream are divided, and which ranks
            share; by default the largest power of two up to 8 and the number of shards. Another number is another
            order.
        kwargs: the options of `ImageReader`.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        size: Sides,
        fields: Mapping[str, str] | None = None,
        samples_per_epoch: Count | None = None,
        buffer: Natural = 1000,
        shuffle_streams: Count | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.errors = DataErrors(_SLOTS)
        self.shards = expand_urls(urls)
        self.fields, self.samples_per_epoch, self.buffer = Fields(fields), samples_per_epoch, max(1, buffer)
        default = 1 << (min(len(self.shards), _MAX_STREAMS).bit_length() - 1)
        self.shuffle_streams = default if shuffle_streams is None else shuffle_streams
        if not 1 <= self.shuffle_streams <= len(self.shards):
            raise UserError(
                f"{urls}: shuffle_streams={shuffle_streams} must be 1 to {len(self.shards)}, the number of shards"
            )

    @property
    def contents(self) -> Contents:
        """Return what the stream consists of."""
        return contents_of_names([Path(shard).name for shard in self.shards])

    @property
    def is_remote(self) -> bool:
        """Return whether any shard is not a local file."""
        return any(is_remote(shard) for shard in self.shards)

    def sampler(self, batch_size: int, seed: int, shuffle: bool, evaluation: bool) -> StreamSampler:
        """Make the sampler of an epoch's undecoded samples."""
        return StreamSampler(self, batch_size, seed=seed, shuffle=shuffle, evaluation=evaluation)

    def decoder(self, evaluation: bool) -> StreamDecoder:
        """Make the data set that decodes what the sampler returns."""
        return StreamDecoder(self, evaluation)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        num_items = 0
        for position, sample in islice(enumerate(self.samples(self.shards)), worker, None, num_workers):
            item = self.read(sample, SampleKey(position))
            if item is not None:
                num_items += 1
                yield item
        if not num_items and worker == 0:
            raise self.nothing_readable()

    def nothing_readable(self) -> UserError:
        """Return the error for a stream, or a whole batch of it, without a readable sample."""
        first = "; ".join(self.errors.first()) or "the shards hold none of the files asked for"
        return UserError(f"{self.shards[0]}: no sample of the {len(self.shards)} shards can be read; {first}")

    def samples(self, shards: Sequence[str]) -> Iterator[Sample]:
        """Return the undecoded samples of some shards in order; a damaged shard is counted, and ends at the damage."""
        for shard in shards:
            yield from self._samples_of(shard)

    def _samples_of(self, shard: str) -> Iterator[Sample]:
        from webdataset.tariterators import tarfile_samples

        is_first = FirstOfEach(shard)
        problems: list[Exception] = []
        yield from tarfile_samples(
            [{"url": shard}],
            handler=partial(_note, problems),
            select_files=lambda name: self.fields.is_needed(name) and is_first(name),
        )
        if problems:  # reported here, since the library would take an error of the handler for another problem
            self._skip(f"{shard}: the rest of it", OSError(_text(problems[0], shard)))

    def read(self, sample: Sample, key: SampleKey) -> dict[str, Any] | None:
        """Decode a sample, or return None if it is unreadable. Raises UserError if too many are."""
        name, files = _name(sample), [file for file in sample if not file.startswith("__")]
        rng = key.generator()
        try:
            if (problem := self.fields.problem(files)) is not None:
                raise ValueError(problem)
            image = self.transform.open(sample[self.fields.image_of(files)])
            fields = self.fields.read(sample.__getitem__, rng)
        except UNREADABLE as error:
            self._skip(name, error)
            return None
        self.errors.count_read()
        if fields.get("caption") == "":
            self.errors.note_empty(_slot(name), name)
        crop = self.transform.sample_crop(image, rng)
        return {"image": self._to_tensor(name, image, crop), **self._shuffled(fields, key)}

    def _skip(self, name: str, error: Exception) -> None:
        self.errors.skip(_slot(name), name, error)

    def texts(self, key: str = "caption") -> Iterator[str]:
        """List the texts under a key without decoding images, to train a tokenizer on them."""
        rng = np.random.default_rng(0)
        for sample in self.samples(self.shards):
            try:
                value = self.fields.read(sample.__getitem__, rng).get(key)
            except (*UNREADABLE, KeyError) as error:
                self._skip(_name(sample), error)
                continue
            if not isinstance(value, str):
                raise UserError(f"{_name(sample)} has no text under {key!r}")
            yield value


def _slot(name: str) -> int:
    return crc32(name.encode(errors="surrogateescape")) % _SLOTS


def _name(sample: Sample) -> str:
    return f"{sample['__url__']}: {sample['__key__']}"


def _note(problems: list[Exception], error: Exception) -> bool:
    """Keep an error that the library reports, and let it continue."""
    problems.append(error)
    return True


def _text(error: Exception, shard: str) -> str:
    """Return what is wrong with a shard, without the objects that the library adds to the arguments of an error."""
    return " ".join(str(arg) for arg in error.args if isinstance(arg, (str, int)) and arg != shard) or repr(error)
