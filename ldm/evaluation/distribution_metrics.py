"""Distances between sets of images, from their features: Fréchet (FID), kernel (KID), inception score, precision.

    Fréchet    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        Heusel et al. 2017; of spatial features: sFID
    kernel     unbiased MMD^2 with (x.y / d + 1)^3                Binkowski et al. 2018
    inception  exp E KL(p(y|x) || p(y))                           Salimans et al. 2016
    precision  fraction of samples inside the 3rd-neighbour balls of real images; recall: of real images inside those
               of samples (Kynkäänniemi et al. 2019)

All are computed by torch-fidelity's own functions. Features are float32 (N, d) on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.extractors import Features

Values = dict[str, float]
_SEED = 2020  # of the subsets and splits; torch-fidelity's own


class Moments(NamedTuple):
    """Mean float32 (d,) and covariance float64 (d, d) of features."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: Tensor) -> Moments:
    """Return mean and covariance of features (N, d), N at least 2."""
    statistics = _fidelity("metric_fid").fid_features_to_statistics(features.float().cpu())
    return Moments(statistics["mu"], np.atleast_2d(statistics["sigma"]))


def frechet_distance(samples: Moments, reference: Moments) -> float:
    """Return the Fréchet distance of two Gaussians. UserError for features of different width."""
    if samples.mean.shape != reference.mean.shape:
        widths = f"{len(samples.mean)} and {len(reference.mean)}"
        raise UserError(f"frechet: features of {widths} numbers; the reference was made with another extractor")
    pair = ({"mu": part.mean, "sigma": part.covariance} for part in (samples, reference))
    return _fidelity("metric_fid").fid_statistics_to_metric(*pair, False)["frechet_inception_distance"]


def _fidelity(module: str) -> Any:
    try:
        return import_module(f"torch_fidelity.{module}")
    except ModuleNotFoundError as error:
        raise UserError("metrics of features need torch-fidelity; pip install 'latent-diffusion[eval]'") from error


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """What samples are compared with: moments, and where they are known the features (M, d) of all `count` images.

    made_by: name and hash of the extractor, where known.
    """

    count: int | None
    pooled: Moments
    spatial: Moments | None = None
    features: Tensor | None = None
    made_by: str | None = None

    @classmethod
    def of(cls, features: Features, made_by: str | None = None) -> ReferenceStatistics:
        """Return moments of features together with the features."""
        spatial = None if features.spatial is None else moments(features.spatial)
        return cls(len(features.pooled), moments(features.pooled), spatial, features.pooled, made_by)


class DistributionMetric(ABC):
    """A metric of a whole set of samples.

    part: field of `Features` that it reads; needs_reference: whether samples are compared with real ones;
    needs_features: whether their moments are too little; minimum: number of samples, and of real images.
    """

    name: ClassVar[str]
    part: ClassVar[str] = "pooled"
    needs_reference: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False

    @property
    def minimum(self) -> int:
        """Return the number of samples, and of images of a reference, that it needs."""
        return 2

    def settings(self) -> dict[str, Any]:
        """Return the options that values depend on."""
        return asdict(self)

    def check(self, features: Features, reference: ReferenceStatistics | None = None) -> None:
        """Raise UserError for what an extractor, known by the features of any images, or a reference lacks."""
        advice = "leave it out, or use inception or scenenet"
        ours = getattr(features, self.part)
        if ours is None:
            raise UserError(f"{self.name}: the extractor has no {self.part}; {advice}")
        if reference is None or not self.needs_reference:
            return
        theirs = getattr(reference, self.part)
        if theirs is None:
            raise UserError(f"{self.name}: the reference has no {self.part} features; {advice}")
        if ours.shape[1] != len(theirs.mean):
            raise UserError(
                f"reference: was made with another extractor, of {len(theirs.mean)} numbers an image; "
                f"this one gives {ours.shape[1]}"
            )
        if self.needs_features and reference.features is None:
            raise UserError(f"{self.name}: needs the features of the reference, this file has moments only; "
                            "leave it out, or use a data set or a folder as reference")  # fmt: skip

    def __call__(self, samples: Features, reference: ReferenceStatistics | None) -> Values:
        """Return values by name, without the extractor's; UserError as in `check`."""
        self.check(samples, reference)
        return self._values(samples, reference)

    @abstractmethod
    def _values(self, samples: Features, reference: ReferenceStatistics | None) -> Values: ...


@dataclass(frozen=True)
class Frechet(DistributionMetric):
    """Fréchet distance; FID with Inception."""

    name: ClassVar[str] = "frechet"

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        ours, theirs = moments(getattr(samples, self.part)), getattr(reference, self.part)
        return {self.name: frechet_distance(ours, theirs)}


@dataclass(frozen=True)
class SpatialFrechet(Frechet):
    """Fréchet distance of spatial features; sFID with Inception."""

    name: ClassVar[str] = "spatial_frechet"
    part: ClassVar[str] = "spatial"


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

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        options = {"kid_subsets": self.subsets, "kid_subset_size": self.size, "rng_seed": _SEED, "verbose": False}
        found = _fidelity("metric_kid").kid_features_to_metric(samples.pooled, reference.features, **options)
        return {"kernel": found["kernel_inception_distance_mean"], "kernel_std": found["kernel_inception_distance_std"]}


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
        found = _fidelity("metric_isc").isc_features_to_metric(samples.logits, self.splits, True, _SEED)
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

    def _values(self, samples: Features, reference: ReferenceStatistics) -> Values:
        options = {"prc_neighborhood": self.neighbourhood, "save_cpu_ram": True, "verbose": False}
        found = _fidelity("metric_prc").prc_features_to_metric(samples.pooled, reference.features, **options)
        return {"precision": found["precision"], "recall": found["recall"]}


DISTRIBUTION_METRICS: dict[str, type[DistributionMetric]] = {
    metric.name: metric for metric in (Frechet, SpatialFrechet, Kernel, InceptionScore, PrecisionRecall)
}
