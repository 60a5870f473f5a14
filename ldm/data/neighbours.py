"""Pictures with their nearest neighbours in a database of CLIP embeddings (retrieval-augmented diffusion, 2204.11824).

A database is a .npz file of `scripts/build_retrieval.py --indir ROOT`: `embedding` (N, D) of norm 1 and `path`
(N,). The condition of a picture are the K rows with the largest inner product with its own.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.folders import ImageFolder
from ldm.errors import UserError

__all__ = ["RetrievalFolder"]


class RetrievalFolder(ImageFolder):
    """Read the pictures of a folder with `neighbours`, float32 (K, D) of norm 1, the most similar one first.

    database: the embeddings of at least the pictures below `root`. A picture is no neighbour of itself. Neighbours are
    searched for exactly, in time proportional to the size of the database. For the other options see `ImageFolder`.
    Raises UserError for a file that is no database, for pictures that it lacks, and if it has no more than K.
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
        self._embeddings, paths = _read_database(Path(database).expanduser())  # (N, D)
        if not 0 < num_neighbours < len(paths):
            raise UserError(f"{database}: has {len(paths)} pictures; num_neighbours={num_neighbours} needs to be less")
        rows = {os.path.abspath(path): row for row, path in enumerate(paths)}
        wanted = [os.path.abspath(self.root / name) for name in self.names]
        absent = [path for path in wanted if path not in rows]
        if absent:
            raise UserError(
                f"{database}: lacks {len(absent)} of the {len(self.names)} pictures below {root}, first {absent[0]}; "
                f"make it again by scripts/build_retrieval.py --indir {root}"
            )
        self._rows = [rows[path] for path in wanted]

    def _read_fields(self, file: int, rng: np.random.Generator) -> dict[str, Any]:
        row = self._rows[file]
        similarity = self._embeddings @ self._embeddings[row]  # (N,)
        similarity[row] = -np.inf
        nearest = np.argpartition(-similarity, self.num_neighbours - 1)[: self.num_neighbours]
        nearest = nearest[np.argsort(-similarity[nearest], kind="stable")]
        return {**super()._read_fields(file, rng), "neighbours": torch.from_numpy(self._embeddings[nearest])}


def _read_database(path: Path) -> tuple[np.ndarray, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            embeddings, paths = content["embedding"].astype(np.float32), [str(name) for name in content["path"]]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is no database ({error}); make one with scripts/build_retrieval.py") from error
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if len(paths) != len(embeddings) or not (norms > 0).all():
        raise UserError(f"{path}: is damaged; make it again with scripts/build_retrieval.py")
    return embeddings / norms, paths
