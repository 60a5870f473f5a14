"""The pictures of a data set through its own transform, by position; and bytes, in which everything is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.data.loader import collate
from ldm.data.pixels import to_bytes
from ldm.data.sampler import rank_and_world
from ldm.errors import UserError

ROUNDING = "uint8, (x + 1) * 127.5 rounded to nearest and clamped"


class PictureSet:
    """Give items of a data set by position, at most `limit`, spread over all of it where there are more.

    A stream is read once and kept in memory. UserError for an empty set.
    """

    def __init__(self, dataset: Dataset, name: str, limit: int | None = None) -> None:
        is_stream = isinstance(dataset, IterableDataset)
        self.dataset: Any = list(islice(iter(dataset), limit)) if is_stream else dataset
        self.name, self.available = name, len(self.dataset)
        if not self.available:
            raise UserError(f"{name}: has no pictures")
        self.count = self.available if limit is None else min(limit, self.available)

    def __len__(self) -> int:
        return self.count

    def batch(self, positions: Sequence[int]) -> dict[str, Any]:
        """Collate the items at these positions; beyond the last it starts anew. UserError for mixed sizes."""
        items = [self.dataset[p % self.count * self.available // self.count] for p in positions]
        sizes = sorted({tuple(item["image"].shape) for item in items})
        if len(sizes) > 1:
            shown = ", ".join("x".join(map(str, size)) for size in sizes[:3])
            raise UserError(f"{self.name}: pictures of several sizes ({shown}); give the data set one `size`")
        return collate(items)

    def digest(self, part: int = 256) -> str:
        """Give the SHA-256 of the bytes of all pictures, in order; the ranks share the reading."""
        rank, world = rank_and_world()
        own = {}
        for number, first in enumerate(range(0, self.count, part)):
            if number % world == rank:
                images = to_bytes(self.batch(range(first, min(first + part, self.count)))["image"])
                own[number] = hashlib.sha256(str(images.shape[1:]).encode() + images.numpy().tobytes()).digest()
        gathered: list[Any] = [own]
        if world > 1:
            gathered = [None] * world
            torch.distributed.all_gather_object(gathered, own)
        joined = {number: digest for part in gathered for number, digest in part.items()}
        return hashlib.sha256(b"".join(joined[number] for number in sorted(joined))).hexdigest()
