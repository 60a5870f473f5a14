"""Sets of images as features (N, d): their moments, what they are compared with, and what a metric of sets is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.extractors import Features
from ldm.evaluation.intervals import GROUPS, Spread, groups_of, jackknife, positions

Values = dict[str, float]


class Moments(NamedTuple):
    """Mean float32 (d,) and covariance float64 (d, d) of features."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: Tensor) -> Moments:
    """Return mean and covariance of features (N, d), N at least 2."""
    statistics = fidelity("metric_fid").fid_features_to_statistics(features.float().cpu())
    return Moments(statistics["mu"], np.atleast_2d(statistics["sigma"]))


def fidelity(module: str) -> Any:
    """Return a module of torch-fidelity. UserError if it is not installed."""
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
    needs_features: whether their moments are too little; needs_training: whether these must be the training images;
    minimum: number of samples, and of real images; most: samples that spreads are measured on.
    """

    name: ClassVar[str]
    part: ClassVar[str] = "pooled"
    needs_reference: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    most: ClassVar[int] = 5000

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

    def spreads(self, values: Values, samples: Features, reference: ReferenceStatistics | None) -> dict[str, Spread]:
        """Return how far values are known over the samples, those of too few samples and deviations left out.

        Of more than `most` samples, these are measured and the deviations scaled by the root of the counts.
        """
        count = len(getattr(samples, self.part))
        measured = min(count, self.most)
        if measured < GROUPS:
            return {}
        chosen = samples if measured == count else _chosen(samples, positions(count)[:measured])
        found = self._without(chosen, reference, groups_of(measured))
        factor, names = math.sqrt(measured / count), found[0] if found else ()
        return {name: jackknife(values[name], [entry[name] for entry in found], factor) for name in names}

    @abstractmethod
    def _values(self, samples: Features, reference: ReferenceStatistics | None) -> Values: ...

    def _without(self, samples: Features, reference: ReferenceStatistics | None, groups: np.ndarray) -> list[Values]:
        """Return the values without each group of samples, deviations left out; nothing where the rest is too small."""
        if len(groups) - -(-len(groups) // GROUPS) < self.minimum:
            return []
        found = [self._values(_chosen(samples, groups != group), reference) for group in range(GROUPS)]
        return [{name: value for name, value in entry.items() if not name.endswith("_std")} for entry in found]


def _chosen(features: Features, which: np.ndarray) -> Features:
    """Return the features of some samples, by mask or position."""
    return Features(*(None if part is None else part[which] for part in features))
