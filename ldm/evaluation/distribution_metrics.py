"""Distances between sets of images, from their features: Fréchet (FID), kernel (KID), MMD (CMMD), precision, recall.

    Fréchet    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        Heusel et al. 2017; of spatial features: sFID
    the same over the mean distance 1 - |cos| from samples to their nearest training images, where that is below 0.1:
               MIFID                                              Bai et al. 2021
    kernel     unbiased MMD^2 with (x.y / d + 1)^3                Binkowski et al. 2018
    mmd        1000 MMD^2 with exp(-|x - y|^2 / (2 10^2)); of CLIP: CMMD      Jayasumana et al. 2024
    inception  exp E KL(p(y|x) || p(y))                           Salimans et al. 2016
    precision  fraction of samples inside the 3rd-neighbour balls of real images; recall: of real images inside those
               of samples (Kynkäänniemi et al. 2019)

All but MMD and the distance to the training set are computed by torch-fidelity's own functions. Features are float32
(N, d) on the CPU. Each metric also says how far its values are known (see `intervals`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.distributions import DistributionMetric, Moments, ReferenceStatistics, Values, fidelity, moments
from ldm.evaluation.extractors import Features
from ldm.evaluation.intervals import GROUPS, Spread, jackknife, positions, standard_error, wilson
from ldm.evaluation.leave_out import frechet_without, mmd_without

_SEED = 2020  # of the subsets and splits; torch-fidelity's own
_CHUNK = 256  # features that are compared with all others at once
_MMD_SCALE = 1000.0  # of the published code
_TINY = 1e-14  # Kaggle's, so that copies are no division by zero


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """Return the Fréchet distance of two Gaussians. UserError for features of different width."""
    if samples.mean.shape != reference.mean.shape:
        widths = f"{len(samples.mean)} and {len(reference.mean)}"
        raise UserError(f"frechet: features of {widths} numbers; the reference was made with another extractor")
    pair = ({"mu": part.mean, "sigma": part.covariance} for part in (samples, reference))
    return fidelity("metric_fid").fid_statistics_to_metric(*pair, False)["frechet_inception_distance"]


@dataclass(frozen=True)
class Frechet(DistributionMetric):
    """Fréchet distance; FID with Inception."""

    name: ClassVar[str] = "frechet"
    most: ClassVar[int] = 1_000_000  # sums are cheap

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        ours, theirs = moments(getattr(samples, self.part)), getattr(reference, self.part)
        return {self.name: frechet_distance(ours, theirs)}

    def _without(self, samples: Features, reference: ReferenceStatistics, groups: np.ndarray) -> list[Values]:
        features, theirs = getattr(samples, self.part).float().numpy(), getattr(reference, self.part)
        return [{self.name: value} for value in frechet_without(features, groups, *theirs)]


@dataclass(frozen=True)
class SpatialFrechet(Frechet):
    """Fréchet distance of spatial features; sFID with Inception."""

    name: ClassVar[str] = "spatial_frechet"
    part: ClassVar[str] = "spatial"


@dataclass(frozen=True)
class MemorisationFrechet(Frechet):
    """Fréchet distance to the training images, divided by how near samples lie to them; MIFID with Inception.

    The divisor is the mean of 1 - |cos| of samples and their nearest training images where it is below `threshold`,
    else 1.
    """

    name: ClassVar[str] = "memorisation_frechet"
    needs_features: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    threshold: float = 0.1

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        nearest = _cosine_distances(samples.pooled, reference.features)
        return {self.name: super()._values(samples, reference)[self.name] / self._divisor(nearest)}

    def _without(self, samples: Features, reference: ReferenceStatistics, groups: np.ndarray) -> list[Values]:
        nearest = _cosine_distances(samples.pooled, reference.features)
        found = [entry[self.name] for entry in super()._without(samples, reference, groups)]
        divisors = [self._divisor(nearest[groups != group]) for group in range(GROUPS)]
        return [{self.name: value / divisor} for value, divisor in zip(found, divisors, strict=True)]

    def _divisor(self, nearest: Tensor) -> float:
        distance = nearest.mean().item()
        return distance + _TINY if distance < self.threshold else 1.0


def _cosine_distances(samples: Tensor, training: Tensor) -> Tensor:
    """Return 1 - |cos| of each sample (N, d) and its nearest training image (M, d), (N,)."""
    training = F.normalize(training.double(), dim=1)
    parts = F.normalize(samples.double(), dim=1).split(_CHUNK)
    return torch.cat([1 - (part @ training.T).abs().amax(1) for part in parts]).clamp_min(0)


@dataclass(frozen=True)
class Kernel(DistributionMetric):
    """Kernel distance, mean and deviation over `subsets` random subsets of `size`; KID with Inception and 1000."""

    name: ClassVar[str] = "kernel"
    needs_features: ClassVar[bool] = True
    subsets: int = 100
    size: int = 1000

    @property
    def minimum(self) -> int:
        """Return the size of a subset."""
        return self.size

    def spreads(self, values: Values, samples: Features, reference: ReferenceStatistics | None) -> dict[str, Spread]:
        """Return how far the mean is known, for the samples and for the choice of the subsets."""
        spread = super().spreads(values, samples, reference).get(self.name)
        if spread is None or self.subsets < 2:
            return {}
        error = standard_error(spread.deviations)
        chance = values[f"{self.name}_std"] ** 2 / (self.subsets - 1)  # variance of the mean over subsets
        factor = math.sqrt(1 + chance / error**2) if error else 1.0
        return {self.name: jackknife(values[self.name], spread.deviations, factor)}

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        options = {"kid_subsets": self.subsets, "kid_subset_size": self.size, "rng_seed": _SEED, "verbose": False}
        found = fidelity("metric_kid").kid_features_to_metric(samples.pooled, reference.features, **options)
        return {"kernel": found["kernel_inception_distance_mean"], "kernel_std": found["kernel_inception_distance_std"]}

    def _without(self, samples: Features, reference: ReferenceStatistics, groups: np.ndarray) -> list[Values]:
        x, y = samples.pooled.double(), reference.features.double()
        return [{self.name: value} for value in mmd_without(_cubic, x, y, groups)]


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    """Return (x.y / d + 1)^3 of all pairs, (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True)
class Mmd(DistributionMetric):
    """1000 times the squared MMD for a Gaussian kernel of deviation `sigma`; CMMD with CLIP and 10.

    The estimate is that of the published code: it counts a sample and itself as a pair, and is never below 0.
    """

    name: ClassVar[str] = "mmd"
    needs_features: ClassVar[bool] = True
    sigma: float = 10.0

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        x, y = samples.pooled.double(), reference.features.double()
        return {self.name: _MMD_SCALE * (self._mean(x, x) + self._mean(y, y) - 2 * self._mean(x, y))}

    def _without(self, samples: Features, reference: ReferenceStatistics, groups: np.ndarray) -> list[Values]:
        x, y = samples.pooled.double(), reference.features.double()
        return [{self.name: _MMD_SCALE * value} for value in mmd_without(self._kernel, x, y, groups)]

    def _mean(self, x: Tensor, y: Tensor) -> float:
        return sum(self._kernel(part, y).sum().item() for part in x.split(_CHUNK)) / (len(x) * len(y))

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Return exp(-|x - y|^2 / (2 sigma^2)) of all pairs, (N, M)."""
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return torch.exp(squares.clamp_min(0) / (-2 * self.sigma**2))


@dataclass(frozen=True)
class InceptionScore(DistributionMetric):
    """Inception score of the samples alone, mean and deviation over `splits` parts."""

    name: ClassVar[str] = "inception_score"
    part: ClassVar[str] = "logits"
    needs_reference: ClassVar[bool] = False
    splits: int = 10

    @property
    def minimum(self) -> int:
        """Return the number of parts."""
        return self.splits

    def _values(self, samples: Features, reference: ReferenceStatistics | None) -> Values:
        found = fidelity("metric_isc").isc_features_to_metric(samples.logits, self.splits, True, _SEED)
        return {self.name: found["inception_score_mean"], f"{self.name}_std": found["inception_score_std"]}


@dataclass(frozen=True)
class PrecisionRecall(DistributionMetric):
    """Precision and recall by balls around the images that reach to the k-th neighbour."""

    name: ClassVar[str] = "precision_recall"
    needs_features: ClassVar[bool] = True
    neighbourhood: int = 3

    @property
    def minimum(self) -> int:
        """Return k neighbours and the image itself."""
        return self.neighbourhood + 1

    def spreads(self, values: Values, samples: Features, reference: ReferenceStatistics | None) -> dict[str, Spread]:
        """Return how far both are known; the precision is a proportion of the samples."""
        found, count = super().spreads(values, samples, reference), len(samples.pooled)
        if not found:
            return {}
        precision, recall = wilson(round(values["precision"] * count), count), found["recall"]
        bounds = {"precision": precision, "recall": (max(recall.low, 0.0), min(recall.high, 1.0))}
        return {name: replace(found[name], low=low, high=high) for name, (low, high) in bounds.items()}

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        options = {"prc_neighborhood": self.neighbourhood, "save_cpu_ram": True, "verbose": False}
        found = fidelity("metric_prc").prc_features_to_metric(samples.pooled, reference.features, **options)
        return {"precision": found["precision"], "recall": found["recall"]}

    def _without(self, samples: Features, reference: ReferenceStatistics, groups: np.ndarray) -> list[Values]:
        fewer = reference.features[positions(len(reference.features))[: self.most]]
        return super()._without(samples, replace(reference, features=fewer), groups)


DISTRIBUTION_METRICS: dict[str, type[DistributionMetric]] = {
    metric.name: metric
    for metric in (Frechet, SpatialFrechet, MemorisationFrechet, Kernel, Mmd, InceptionScore, PrecisionRecall)
}
