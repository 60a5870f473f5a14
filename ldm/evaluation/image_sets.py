"""The pictures of a data set through its own transform, by position; and bytes, in which everything is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ldm import distributed
from ldm.data.core.loader import collate
from ldm.data.core.module import errors_of
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.errors import UserError

ROUNDING = "uint8, (x + 1) * 127.5 rounded to nearest and clamped"
_PART = 256  # pictures that are hashed together


class PictureSet:
    """Return items of a data set by position, at most `limit`, spread over all of it where there are more.

    Of a stream the first `limit` are read once and kept in memory. UserError for an empty set and, unless they are
    replaced as in training (`replaces`), for unreadable pictures.
    """

    def __init__(self, dataset: Dataset, name: str, limit: int | None = None, replaces: bool = False) -> None:
        is_stream = isinstance(dataset, IterableDataset)
        self.name, self._tally = name, None if replaces else errors_of(dataset)
        self.dataset: Any = [_packed(item) for item in islice(iter(dataset), limit)] if is_stream else dataset
        self._check_readable()
        self.available = len(self.dataset)
        if not self.available:
            raise UserError(f"{name}: has no pictures")
        self.count = self.available if limit is None else min(limit, self.available)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Give (C, H, W) of the pictures."""
        return tuple(self._item(0)["image"].shape)

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        """Collate the items at these positions; beyond the last it starts anew. UserError for mixed sizes."""
        items = [self._item(p % self.count * self.available // self.count) for p in positions]
        self._check_readable()
        sizes = sorted({self.shape, *(tuple(item["image"].shape) for item in items)})
        if len(sizes) > 1:
            shown = ", ".join("x".join(map(str, size)) for size in sizes[:3])
            raise UserError(f"{self.name}: pictures of several sizes ({shown}); give the data set one `size`")
        return collate(items)

    def digest(self) -> str:
        """Return the SHA-256 of the bytes of all pictures, in order; the ranks share the reading, done once."""
        return self._digests[0]

    def data_digest(self) -> str:
        """Return the SHA-256 of pictures and all that comes with them: texts, labels, boxes, ..."""
        return self._digests[1]

    @cached_property
    def _digests(self) -> tuple[str, str]:
        rank, world = distributed.rank(), distributed.world_size()
        own = {}
        for number, first in enumerate(range(0, self.count, _PART)):
            if number % world == rank:
                batch = self.batch(range(first, min(first + _PART, self.count)))
                images = to_bytes(batch.pop("image"))
                seen = hashlib.sha256(str(images.shape[1:]).encode() + images.numpy().tobytes())
                own[number] = seen.digest(), _sha256(_content(batch), seen.digest())
        gathered: list[Any] = [own]
        if world > 1:
            gathered = [None] * world
            torch.distributed.all_gather_object(gathered, own)
        joined = {number: digests for part in gathered for number, digests in part.items()}
        columns = zip(*(joined[number] for number in sorted(joined)), strict=True)
        pictures, data = (hashlib.sha256(b"".join(column)).hexdigest() for column in columns)
        return pictures, data

    def _item(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        if "image" not in item:
            raise UserError(f"{self.name}: items have no 'image', they have {', '.join(map(str, item))}")
        return {**item, "image": from_bytes(item["image"])} if item["image"].dtype == torch.uint8 else item

    def _check_readable(self) -> None:
        if self._tally is not None and self._tally.num_unreadable:
            first = next(iter(self._tally.first()), "a picture")
            raise UserError(f"{self.name}: {first}: cannot be read; repair or remove it, so that all are measured")


def _sha256(content: Iterator[bytes], start: bytes) -> bytes:
    digest = hashlib.sha256(start)
    for piece in content:
        digest.update(piece)
    return digest.digest()


def _content(value: Any) -> Iterator[bytes]:
    """List what is in tensors, texts and numbers, and in lists and dicts of them."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        for key in sorted(value):
            yield repr(key).encode()
            yield from _content(value[key])
    elif isinstance(value, (list, tuple)):
        yield str(len(value)).encode()
        for entry in value:
            yield from _content(entry)
    else:
        yield repr(value).encode()


def _packed(item: dict[str, Any]) -> dict[str, Any]:
    """Keep the picture of an item as bytes, a quarter of the memory, where that loses nothing."""
    if "image" not in item:
        return item
    image = to_bytes(item["image"])
    return {**item, "image": image} if torch.equal(from_bytes(image), item["image"]) else item
