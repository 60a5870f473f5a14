"""Pictures with their nearest neighbours in a database of CLIP embeddings (retrieval-augmented diffusion, 2204.11824).

The condition of a picture are the K embeddings of the database of `scripts/build_retrieval.py --indir ROOT` with the
largest inner product with its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.embeddings import Database
from ldm.data.folders import ImageFolder
from ldm.errors import UserError

__all__ = ["RetrievalFolder"]


class RetrievalFolder(ImageFolder):
    """Read the pictures of a folder with `neighbours`, float32 (K, D) of norm 1, the most similar one first.

    database: the embeddings of at least the pictures below `root`. A picture is no neighbour of itself. Neighbours are
    searched for exactly, in time proportional to the size of the database. For the other options see `ImageFolder`.
    Raises UserError for what is no database, for pictures that it lacks, and if it has no more than K.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | Sequence[int],
        database: str | Path,
        num_neighbours: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, size, **kwargs)
        self.num_neighbours = num_neighbours
        self._database = Database.load(database)
        count = len(self._database.paths)
        if not 0 < num_neighbours < count:
            raise UserError(f"{database}: has {count} pictures; num_neighbours={num_neighbours} needs to be less")
        rows = {os.path.abspath(path): row for row, path in enumerate(self._database.paths)}
        wanted = [os.path.abspath(self.root / name) for name in self.names]
        absent = [path for path in wanted if path not in rows]
        if absent:
            raise UserError(
                f"{database}: lacks {len(absent)} of the {len(self.names)} pictures below {root}, first {absent[0]}; "
                f"make it again by scripts/build_retrieval.py --indir {root}"
            )
        self._rows = [rows[path] for path in wanted]

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        row, embeddings = self._rows[file], self._database.embeddings
        found = self._database.nearest(embeddings[[row]], self.num_neighbours + 1)[0][0]
        others = found[found != row][: self.num_neighbours]  # a copy of the picture may stand before it
        return {**super()._read_fields(file, rng), "neighbours": embeddings[others]}
