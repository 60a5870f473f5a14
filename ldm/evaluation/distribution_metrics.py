"""Distances between sets of pictures, from their features: Fréchet (FID), kernel (KID), inception score, precision.

    Fréchet    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        Heusel et al. 2017; on a map's features: sFID
    kernel     unbiased MMD^2 with (x.y / d + 1)^3                Binkowski et al. 2018
    inception  exp E KL(p(y|x) || p(y))                           Salimans et al. 2016
    precision  share of samples within the 3rd-neighbour balls of real pictures; recall: the other way round
               (Kynkäänniemi et al. 2019)

All are computed by torch-fidelity's own functions. Features are float32 (N, d) on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
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
    """Return the Fréchet distance of the Gaussians with these moments. UserError for features of another width."""
    if samples.mean.shape != reference.mean.shape:
        widths = f"{len(samples.mean)} and {len(reference.mean)}"
        raise UserError(f"frechet: features of {widths} numbers; the reference was made with another extractor")
    pair = ({"mu": part.mean, "sigma": part.covariance} for part in (samples, reference))
    return _fidelity("metric_fid").fid_statistics_to_metric(*pair, False)["frechet_inception_distance"]


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Return mean and deviation of the kernel distance over random subsets of `size`, of features (N, d) and (M, d)."""
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": _SEED, "verbose": False}
    found = _fidelity("metric_kid").kid_features_to_metric(samples, reference, **options)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Return mean and deviation over `splits` parts of the exponential of the mean divergence, of logits (N, K)."""
    found = _fidelity("metric_isc").isc_features_to_metric(logits, splits, True, _SEED)
    return found["inception_score_mean"], found["inception_score_std"]


def precision_recall(samples: Tensor, reference: Tensor, neighbourhood: int = 3) -> tuple[float, float]:
    """Return precision and recall of features (N, d) and (M, d)."""
    options = {"prc_neighborhood": neighbourhood, "save_cpu_ram": True, "verbose": False}
    found = _fidelity("metric_prc").prc_features_to_metric(samples, reference, **options)
    return found["precision"], found["recall"]


def _fidelity(module: str) -> Any:
    try:
        return import_module(f"torch_fidelity.{module}")
    except ModuleNotFoundError as error:
        raise UserError("figures of features need torch-fidelity; pip install 'latent-diffusion[eval]'") from error


# ------------------------------------------------------------------------------------------------- as asked for by name


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are held against: moments, and where they are known all features (M, d) of `count` pictures.

    made_by: name and hash of the extractor, where it is known.
    """

    count: int | None
    pooled: Moments
    spatial: Moments | None = None
    features: Tensor | None = None
    made_by: str | None = None

    @classmethod
    def of(cls, features: Features, made_by: str | None = None) -> Reference:
        """Take the moments of features, and keep the features."""
        spatial = None if features.spatial is None else moments(features.spatial)
        return cls(len(features.pooled), moments(features.pooled), spatial, features.pooled, made_by)

    def all_features(self, metric: str) -> Tensor:
        """Return the features themselves. UserError where only their moments were imported."""
        if self.features is None:
            raise UserError(f"{metric}: needs the features of the reference, this file has moments only; "
                            "leave it out, or use a data set or a folder as --reference")  # fmt: skip
        return self.features


class SetMetric(ABC):
    """A figure of a whole set of samples."""

    needs_reference: ClassVar[bool] = True

    @property
    def minimum(self) -> int:
        """Say how many samples, and pictures of a reference, it needs."""
        return 2

    def check(self, seen: Features, reference: Reference | None = None) -> None:
        """Raise UserError for what an extractor, by the features of any pictures, or a reference lacks."""
        if reference is not None:
            _check_width(seen.pooled, reference.pooled)

    @abstractmethod
    def __call__(self, samples: Features, reference: Reference | None) -> Values:
        """Return figures by name, without the extractor's."""


def _check_width(features: Tensor, reference: Moments) -> None:
    if features.shape[1] != len(reference.mean):
        raise UserError(
            f"--reference: was made with another extractor, of {len(reference.mean)} numbers a picture; "
            f"this one gives {features.shape[1]}"
        )


@dataclass(frozen=True)
class Frechet(SetMetric):
    """Fréchet distance; FID with Inception."""

    def __call__(self, samples: Features, reference: Reference) -> Values:
        """Compare the moments."""
        return {"frechet": frechet_distance(moments(samples.pooled), reference.pooled)}


@dataclass(frozen=True)
class SpatialFrechet(SetMetric):
    """Fréchet distance of features that know places; sFID with Inception."""

    def check(self, seen: Features, reference: Reference | None = None) -> None:
        """Raise UserError where places are not known."""
        super().check(seen, reference)
        if seen.spatial is None or (reference is not None and reference.spatial is None):
            raise UserError("spatial_frechet: extractor or reference have no features of places; leave it out, or use "
                            "inception or scenenet")  # fmt: skip
        if reference is not None:
            _check_width(seen.spatial, reference.spatial)

    def __call__(self, samples: Features, reference: Reference) -> Values:
        """Compare the moments."""
        self.check(samples, reference)
        return {"spatial_frechet": frechet_distance(moments(samples.spatial), reference.spatial)}


@dataclass(frozen=True)
class Kernel(SetMetric):
    """Kernel distance, mean and deviation over `subsets` random subsets of `size`; KID with Inception and 1000."""

    subsets: int = 100
    size: int = 1000

    @property
    def minimum(self) -> int:
        """Return the size of a subset."""
        return self.size

    def check(self, seen: Features, reference: Reference | None = None) -> None:
        """Raise UserError for a reference of moments alone."""
        super().check(seen, reference)
        if reference is not None:
            reference.all_features("kernel")

    def __call__(self, samples: Features, reference: Reference) -> Values:
        """Compare subsets of both."""
        real = reference.all_features("kernel")
        mean, deviation = kernel_distance(samples.pooled, real, self.subsets, self.size)
        return {"kernel": mean, "kernel_std": deviation}


@dataclass(frozen=True)
class InceptionScore(SetMetric):
    """Inception score, mean and deviation over `splits` parts; of the samples alone."""

    splits: int = 10
    needs_reference: ClassVar[bool] = False

    @property
    def minimum(self) -> int:
        """Return as many as there are parts."""
        return self.splits

    def check(self, seen: Features, reference: Reference | None = None) -> None:
        """Raise UserError for an extractor without classes."""
        if seen.logits is None:
            raise UserError("inception_score: the extractor has no classes; leave it out, or use inception or scenenet")

    def __call__(self, samples: Features, reference: Reference | None) -> Values:
        """Score the logits."""
        self.check(samples)
        mean, deviation = inception_score(samples.logits, self.splits)
        return {"inception_score": mean, "inception_score_std": deviation}


@dataclass(frozen=True)
class PrecisionRecall(SetMetric):
    """Precision and recall by balls around the pictures that reach to the k-th neighbour."""

    neighbourhood: int = 3

    @property
    def minimum(self) -> int:
        """Return k neighbours and the picture itself."""
        return self.neighbourhood + 1

    def check(self, seen: Features, reference: Reference | None = None) -> None:
        """Raise UserError for a reference of moments alone."""
        super().check(seen, reference)
        if reference is not None:
            reference.all_features("precision_recall")

    def __call__(self, samples: Features, reference: Reference) -> Values:
        """Compare the two sets."""
        real = reference.all_features("precision_recall")
        precision, recall = precision_recall(samples.pooled, real, self.neighbourhood)
        return {"precision": precision, "recall": recall}


SET_METRICS: dict[str, Callable[[], SetMetric]] = {
    "frechet": Frechet,
    "spatial_frechet": SpatialFrechet,
    "kernel": Kernel,
    "inception_score": InceptionScore,
    "precision_recall": PrecisionRecall,
}
