"""The metrics of one evaluation, and whether they can be computed: checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.distributions import DistributionMetric, Values
from ldm.evaluation.extractors import Extractor, Features
from ldm.evaluation.image_metrics import ImageMetric
from ldm.evaluation.image_sets import ROUNDING, SPLIT
from ldm.evaluation.intervals import Spread
from ldm.evaluation.references import ReferenceSet, made_by

_SIDE = 64  # of the black image that extractors are tried on


class _Entries(dict[str, Any]):
    """The entries of a batch, for one metric; UserError names an absent one."""

    def __init__(self, metric: str, batch: Mapping[str, Any]) -> None:
        super().__init__(batch)
        self.metric = metric

    def __missing__(self, key: str) -> Any:
        problem = f"{self.metric}: needs '{key}' of each image's batch, there is {', '.join(self) or 'nothing'}"
        raise UserError(f"{problem}; leave it out of the metrics")


@dataclass(frozen=True, eq=False)
class MetricSuite:
    """Metrics of one evaluation by name: `sets` compare features of `extractor`, `images` score each image.

    The first `keep` images are kept to be looked at.
    """

    sets: Mapping[str, DistributionMetric] = field(default_factory=dict)
    extractor: Extractor | None = None
    images: Mapping[str, ImageMetric] = field(default_factory=dict)
    keep: int = 64

    @property
    def needs_reference(self) -> bool:
        """Return whether any metric compares sets."""
        return any(metric.needs_reference for metric in self.sets.values())

    def check(self, count: int) -> None:
        """Raise UserError as `check_count` does, and for an extractor without weights or without what a metric needs.

        Nothing of data and model is needed for it.
        """
        self.check_count(count)
        self._check_features(None)

    def check_count(self, count: int) -> None:
        """Raise UserError for no metrics, no extractor, or fewer samples than a metric needs; needs no weights."""
        if not self.sets and not self.images:
            raise UserError("evaluation: no metrics; name some")
        for name, metric in self.sets.items():
            if self.extractor is None:
                raise UserError(f"{name}: is measured on features; name an extractor")
            if count < metric.minimum:
                raise UserError(f"{name}: needs {metric.minimum} samples or more, there are {count}")

    def check_source(self, name: str) -> None:
        """Raise UserError if a reference of this name is a split of the data, and not the one that a metric needs."""
        if name.startswith(SPLIT) and name != f"{SPLIT}train":
            for metric in filter(lambda metric: metric.needs_training, self.sets.values()):
                raise UserError(f"{metric.name}: compares with the training images, not {name}; use train as reference")

    def check_reference(self, reference: ReferenceSet | None) -> None:
        """Raise UserError for a reference that is absent, has too few images, or lacks what a metric needs."""
        for name, metric in self.sets.items():
            if not metric.needs_reference:
                continue
            if reference is None:
                raise UserError(f"{name}: needs a reference; name a data set, a folder or an .npz file")
            number = reference.statistics.count
            if number is not None and number < metric.minimum:
                raise UserError(f"{name}: needs {metric.minimum} images of reference or more, there are {number}")
        if reference is not None:
            self.check_source(reference.provenance["source"])
        if reference is not None and self.extractor is not None:
            maker = reference.statistics.made_by
            if maker not in (None, made_by(self.extractor)):
                raise UserError(f"reference: was made by the extractor {maker}, not by {made_by(self.extractor)}")
            self._check_features(reference)

    def check_batch(self, batch: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """Raise UserError for an image metric that fails on a black image of `shape` (C, H, W) and a batch of one."""
        for name, metric in self.images.items():
            try:
                values = metric(torch.full((1, *shape), -1.0), _Entries(name, batch))
            except TypeError as error:
                raise UserError(f"{name}: cannot be called with images and their batch ({error})") from error
            if not isinstance(values, Tensor) or values.shape != (1,):
                raise UserError(f"{name}: does not return one value for each image")

    def score_images(self, images: Tensor, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield each image metric's name and values (B,) of images (B, C, H, W) in [-1, 1]."""
        for name, metric in self.images.items():
            yield name, metric(images, _Entries(name, batch)).float()

    def compare_sets(self, features: Features, reference: ReferenceSet | None) -> Values:
        """Return the values of all sets, their names followed by the extractor's in brackets."""
        statistics = None if reference is None else reference.statistics
        found = [metric(features, statistics) for metric in self.sets.values()]
        return {f"{name}[{self.extractor.name}]": value for values in found for name, value in values.items()}

    def spreads(self, values: Values, features: Features, reference: ReferenceSet | None) -> dict[str, Spread]:
        """Return how far the values of `compare_sets` are known, by the same names, where that can be said."""
        statistics, ending = None if reference is None else reference.statistics, f"[{self.extractor.name}]"
        own = {name.removesuffix(ending): value for name, value in values.items()}
        found = [metric.spreads(own, features, statistics) for metric in self.sets.values()]
        return {name + ending: spread for spreads in found for name, spread in spreads.items()}

    def settings(self) -> dict[str, Any]:
        """Return all of the suite that values depend on."""
        settings: dict[str, Any] = {"pixels": ROUNDING}
        if self.extractor is not None:
            extractor = self.extractor
            settings["extractor"] = {"name": extractor.name, "sha256": extractor.hash, "resize": extractor.resize}
        sets = {name: metric.settings() for name, metric in self.sets.items()}
        return settings | {"metrics": sets | self.image_settings()}

    def image_settings(self) -> dict[str, Any]:
        """Return the settings of the image metrics; their options are part of their names."""
        return {name: metric.settings() for name, metric in self.images.items()}

    def _check_features(self, reference: ReferenceSet | None) -> None:
        problems = []
        for metric in self.sets.values():
            try:
                metric.check(self._features_of_black, None if reference is None else reference.statistics)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(dict.fromkeys(problems)))

    @cached_property
    def _features_of_black(self) -> Features:
        return self.extractor(torch.zeros(1, 3, _SIDE, _SIDE, dtype=torch.uint8))
