"""Neighbours of images by their thumbnails: retrieval without a pretrained network (after arXiv 2204.11824).

The embedding of an image is its thumbnail without its mean colour, as a vector of norm 1: inner products are then
correlations of coarse colours and positions. It replaces CLIP where nothing can be downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ldm.bounds import Count
from ldm.data.core.derived import DerivedDataset
from ldm.errors import UserError

__all__ = ["ThumbnailNeighbours", "thumbnail_embeddings"]

_SAME = 1 - 1e-5  # similarity of an image with itself


class ThumbnailNeighbours(DerivedDataset):
    """Add `neighbours` float32 (K, C * side * side): the embeddings of the K most similar images of `database`.

    The most similar one comes first; an image is no neighbour of itself. The database is embedded at the first item.
    Raises UserError unless it holds more than K images.
    """

    stream = 3

    def __init__(self, dataset: Dataset, database: Dataset, num_neighbours: Count = 4, side: Count = 8) -> None:
        super().__init__(dataset)
        if not 0 < num_neighbours < len(database):
            raise UserError(
                f"ThumbnailNeighbours: num_neighbours={num_neighbours} must be positive and less than the "
                f"{len(database)} images of the database"
            )
        self.database, self.num_neighbours, self.side = database, num_neighbours, side
        self._embeddings: Tensor | None = None

    def _derive(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        if self._embeddings is None:
            images = (self.database[i]["image"] for i in range(len(self.database)))
            self._embeddings = torch.cat([thumbnail_embeddings(image[None], self.side) for image in images])
        similarity = self._embeddings @ thumbnail_embeddings(image[None], self.side)[0]  # (N,)
        nearest = similarity.masked_fill(similarity > _SAME, -2.0).topk(self.num_neighbours).indices
        return {"neighbours": self._embeddings[nearest]}


def thumbnail_embeddings(images: Tensor, side: int = 8) -> Tensor:
    """Embed images (B, C, H, W): (B, C * side * side) of norm 1; zeros for an image of one colour."""
    small = F.adaptive_avg_pool2d(images, side)
    return F.normalize((small - small.mean((2, 3), keepdim=True)).flatten(1), dim=1)
