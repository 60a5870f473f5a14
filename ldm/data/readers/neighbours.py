"""Pictures with their nearest neighbours in a database of CLIP embeddings (retrieval-augmented diffusion, 2204.11824).

The condition of a picture are the K embeddings of the database of `scripts/build_retrieval.py --indir ROOT` with the
largest inner product with its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.bounds import Count
from ldm.data.readers.embeddings import Database, Index
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError

__all__ = ["RetrievalFolder"]

_log = logging.getLogger(__name__)


class RetrievalFolder(ImageFolder):
    """Read the pictures of a folder with `neighbours`, float32 (K, D) of norm 1, the most similar one first.

    database: the embeddings of the pictures below `root`, and of others if you like; pictures that it lacks are left
    out, with a warning. A picture is no neighbour of itself. All neighbours are searched for once, at the start, in
    time proportional to pictures times entries; index: see `Database.nearest`. For the other options see
    `ImageFolder`. Raises UserError for what is no database, if it has none of the pictures, or no more than K.
    """

    def __init__(
        self,
        root: str | Path,
        size: Count | Sequence[Count],
        database: str | Path,
        num_neighbours: Count = 4,
        index: Index = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size, **kwargs)
        self.num_neighbours = num_neighbours
        found = Database.load(database)
        count = len(found.paths)
        if not 0 < num_neighbours < count:
            raise UserError(f"{database}: has {count} pictures; num_neighbours={num_neighbours} needs to be less")
        rows = {os.path.abspath(path): row for row, path in enumerate(found.paths)}
        self._index(self._embedded(rows.keys(), str(database)), str(root))
        self._embeddings = found.embeddings
        own = torch.tensor([rows[self._path_of(name)] for name in self.names])
        self._neighbours = _others(found, own, num_neighbours, index)  # (files, K)

    def _path_of(self, name: str) -> str:
        return os.path.abspath(self.root / name)

    def _embedded(self, paths: Container[str], database: str) -> list[str]:
        """List the pictures that the database has; UserError if it has none of them."""
        absent = [name for name in self.names if self._path_of(name) not in paths]
        what = f"{database}: lacks {len(absent)} of the {len(self.names)} pictures below {self.root}"
        remedy = f"make it again by scripts/build_retrieval.py --indir {self.root}"
        if len(absent) == len(self.names):
            raise UserError(f"{what}, first {self._path_of(absent[0])}; {remedy}")
        if absent:
            _log.warning("%s, which are left out, first %s; if they can be read, %s", what, absent[0], remedy)
        return [name for name in self.names if self._path_of(name) in paths]

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return {**super()._read_fields(file, rng), "neighbours": self._embeddings[self._neighbours[file]]}


def _others(database: Database, rows: Tensor, count: int, index: Index) -> Tensor:
    """Find the nearest entries of rows (N,) of a database other than themselves: int32 (N, count)."""
    found, _ = database.nearest(database.embeddings[rows], count + 1, index)
    is_itself = found == rows[:, None]  # not always there: copies of the picture may stand before it
    order = is_itself.int().sort(dim=1, stable=True).indices[:, :count]
    return found.gather(1, order).int()
