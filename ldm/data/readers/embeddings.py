"""A database of embeddings, and its nearest neighbours (retrieval-augmented diffusion, Blattmann et al. 2022).

Embeddings have L2 norm 1, so that inner products rank like distances. A database is one .npz file with `embedding`
(N, D) and `path` (N,); the databases published with RDM, which have `img_id` for the paths, can be read as well.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError

Index = Literal["exact", "faiss"]
_CHUNK, _QUERIES = 2**18, 64  # entries and queries that are compared at a time


@dataclass(frozen=True, eq=False)
class Database:
    """Embeddings float32 (N, D) of norm 1, and the paths of the files that they embed."""

    embeddings: Tensor
    paths: list[str]

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.paths) or not self.paths:
            shape = tuple(self.embeddings.shape)
            raise UserError(f"embeddings of shape {shape} do not fit {len(self.paths)} paths")
        if not self.embeddings.any(dim=1).all():
            raise UserError("some embeddings are zero; make the database again")

    def save(self, path: Path) -> None:
        """Write the .npz file. Raises UserError if that fails."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, embedding=self.embeddings.numpy(), path=np.array(self.paths))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: str | Path) -> Database:
        """Read a file, or all .npz files of a folder. Raises UserError for other files."""
        place = Path(path).expanduser()
        files = sorted(place.glob("*.npz")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"{path}: no database; make one with scripts/build_retrieval.py")
        parts = [_read(file) for file in files]
        embeddings = torch.cat([part[0] for part in parts])
        try:
            return cls(F.normalize(embeddings, dim=-1), [name for part in parts for name in part[1]])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def nearest(self, queries: Tensor, count: int, index: Index = "exact") -> tuple[Tensor, Tensor]:
        """Return the `count` most similar entries of queries (Q, D): int64 indices and similarities, both (Q, count).

        The most similar entry is first. Raises UserError for more neighbours than entries, or another width.
        """
        if not 1 <= count <= len(self.paths):
            raise UserError(f"retrieval: {count} neighbours asked for; the database has {len(self.paths)} entries")
        if queries.shape[-1] != self.embeddings.shape[1]:
            raise UserError(
                f"retrieval: the query has {queries.shape[-1]} numbers, the database {self.embeddings.shape[1]}; "
                "use the CLIP with which it was made"
            )
        queries = F.normalize(queries.float().cpu(), dim=-1)
        return _by_faiss(self.embeddings, queries, count) if index == "faiss" else self._exact(queries, count)

    def _exact(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        parts = [self._compared(some, count) for some in queries.split(_QUERIES)]
        where, best = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return where, best

    def _compared(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        best = torch.full((len(queries), count), -2.0)
        where = torch.zeros(len(queries), count, dtype=torch.long)
        for start in range(0, len(self.embeddings), _CHUNK):
            found = queries @ self.embeddings[start : start + _CHUNK].T  # (Q, chunk)
            positions = torch.arange(start, start + found.shape[1]).expand_as(found)
            best, order = torch.cat([best, found], dim=1).topk(count, dim=1)
            where = torch.cat([where, positions], dim=1).gather(1, order)
        return where, best


def _read(file: Path) -> tuple[Tensor, list[str]]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            key = next((name for name in ("path", "img_id") if name in arrays.files), None)
            if key is None or "embedding" not in arrays.files:
                raise UserError(f"{file}: holds {', '.join(arrays.files)}; a database has `embedding` and `path`")
            return torch.from_numpy(arrays["embedding"].astype(np.float32)), [str(name) for name in arrays[key]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: is no .npz file of plain arrays ({error})") from error


def _by_faiss(embeddings: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("index faiss: needs the package faiss-cpu (pip install faiss-cpu), or use exact") from error
    table = faiss.IndexFlatIP(embeddings.shape[1])
    table.add(embeddings.numpy())
    similarities, where = table.search(queries.numpy(), count)
    return torch.from_numpy(where), torch.from_numpy(similarities)
