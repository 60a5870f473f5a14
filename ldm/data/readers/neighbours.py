"""Images with their nearest neighbours in a database of CLIP embeddings (retrieval-augmented diffusion, 2204.11824).

The condition of an image are the K embeddings with the largest inner product with its own, from the database that
`scripts/build_retrieval.py --indir ROOT` writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.bounds import Count, Sides
from ldm.data.readers.embeddings import Database, Index
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError

__all__ = ["RetrievalFolder"]

_log = logging.getLogger(__name__)


class RetrievalFolder(ImageFolder):
    """Read the images of a folder with `neighbours`, float32 (K, D) of norm 1, the most similar one first.

    An image is no neighbour of itself. All neighbours are searched for at the start, in time proportional to images
    times entries. Raises UserError for files that are no database, and for one with none of the images or too few.

    Args:
        database: the embeddings of the images below `root`, and of any others. Images that are not in it are left
            out, with a warning.
        num_neighbours: K, less than the number of entries.
        index: how to search, see `Database.nearest`.
        kwargs: the options of `ImageFolder`.
    """

    def __init__(
        self,
        root: str | Path,
        size: Sides,
        database: str | Path,
        num_neighbours: Count = 4,
        index: Index = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size, **kwargs)
        self.num_neighbours = num_neighbours
        entries = Database.load(database)
        if not 0 < num_neighbours < len(entries.paths):
            raise UserError(
                f"{database}: has {len(entries.paths)} images; num_neighbours={num_neighbours} needs to be less"
            )
        rows = {os.path.abspath(path): row for row, path in enumerate(entries.paths)}
        self._keep(self._embedded(rows.keys(), str(database)))
        self._embeddings = entries.embeddings
        own = torch.tensor([rows[self._path_of(name)] for name in self.names])
        self._neighbours = _others(entries, own, num_neighbours, index)  # (files, K)

    def _path_of(self, name: str) -> str:
        return os.path.abspath(self.root / name)

    def _embedded(self, paths: Container[str], database: str) -> list[str]:
        """List the images that are in the database. Raises UserError if there are none."""
        absent = [name for name in self.names if self._path_of(name) not in paths]
        what = f"{database}: lacks {len(absent)} of the {len(self.names)} images below {self.root}"
        remedy = f"make it again by scripts/build_retrieval.py --indir {self.root}"
        if len(absent) == len(self.names):
            raise UserError(f"{what}, first {self._path_of(absent[0])}; {remedy}")
        if absent:
            _log.warning("%s, which are left out, first %s; if they can be read, %s", what, absent[0], remedy)
        return [name for name in self.names if self._path_of(name) in paths]

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        return {**super()._read_fields(file, rng), "neighbours": self._embeddings[self._neighbours[file]]}


def _others(database: Database, rows: Tensor, count: int, index: Index) -> Tensor:
    """Return the nearest entries of rows (N,) of a database other than themselves: int32 (N, count)."""
    found, _ = database.nearest(database.embeddings[rows], count + 1, index)
    is_itself = found == rows[:, None]  # it may be missing: copies of the image can come before it
    order = is_itself.int().sort(dim=1, stable=True).indices[:, :count]
    return found.gather(1, order).int()
