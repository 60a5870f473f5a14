"""Whether a model repeats its training set: nearest training images of samples, compared with those of held-out images.

    ratio = median over samples of their distance to the training set / the same of held-out images

Both search the same training set, so that its size does not matter. About 1: samples are as far from it as new
images are. Far below 1: they are copies. Distances are Euclidean, of pixels and of features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.evaluation.extractors import Extractor
from ldm.evaluation.image_sets import ImageSet

_BATCH = 256
Space = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Nearest:
    """In one space: distances of samples (K,) and of held-out images (M,); the samples' neighbours (K, C, H, W)."""

    distances: Tensor
    held_out: Tensor
    images: Tensor

    @property
    def ratio(self) -> float:
        """Return the median distance of samples over that of held-out images; 1 where both are 0."""
        ours, theirs = self.distances.median().item(), self.held_out.median().item()
        return ours / theirs if theirs else float(ours == theirs) or float("inf")


def nearest_neighbours(
    samples: Tensor,
    train: ImageSet,
    held_out: ImageSet,
    extractor: Extractor,
    on_images: Callable[[int], None] = lambda count: None,
) -> dict[str, Nearest]:
    """Search the training set for samples, bytes (K, C, H, W): `pixels` and the extractor's name -> nearest."""
    spaces: dict[str, Space] = {
        "pixels": lambda images: from_bytes(images).flatten(1),
        extractor.name: lambda images: extractor(images).pooled,
    }
    others = to_bytes(held_out.batch(range(len(held_out)))["image"])
    queries = {name: torch.cat([space(samples), space(others)]) for name, space in spaces.items()}
    best = {name: torch.full((len(query),), torch.inf) for name, query in queries.items()}
    found = {name: samples.clone() for name in spaces}
    for first in range(0, len(train), _BATCH):
        images = to_bytes(train.batch(range(first, min(first + _BATCH, len(train))))["image"])
        for name, space in spaces.items():
            # Exact differences: the usual expansion of the square is off by most of a small distance.
            mode = "donot_use_mm_for_euclid_dist"
            distance, where = torch.cdist(queries[name], space(images), compute_mode=mode).min(1)
            is_nearer = distance < best[name]
            best[name] = torch.where(is_nearer, distance, best[name])
            ours = is_nearer[: len(samples)]
            found[name][ours] = images[where[: len(samples)][ours]]
        on_images(len(images))
    count = len(samples)
    return {name: Nearest(best[name][:count], best[name][count:], found[name]) for name in spaces}
