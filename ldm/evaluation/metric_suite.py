"""What is measured, and whether it can be: what a figure lacks is told before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.distribution_metrics import SetMetric
from ldm.evaluation.extractors import Extractor, Features
from ldm.evaluation.image_metrics import Weighted
from ldm.evaluation.image_sets import ROUNDING
from ldm.evaluation.references import Referenced, maker

PictureMetric = Callable[[Tensor, Mapping[str, Any]], Tensor]
_SIDE = 64  # of the black picture that extractors are tried on


class _Entries(dict[str, Any]):
    """The entries of a batch, for one metric; UserError names an absent one."""

    def __init__(self, metric: str, batch: Mapping[str, Any]) -> None:
        super().__init__(batch)
        self.metric = metric

    def __missing__(self, key: str) -> Any:
        problem = f"{self.metric}: needs '{key}' beside each picture, there is {', '.join(self) or 'nothing'}"
        raise UserError(f"{problem}; leave it out of --metrics")


@dataclass(frozen=True, eq=False)
class Judges:
    """Say what is measured: figures of sets, by features of `extractor`, and of single pictures, by their names.

    `pictures`: images (B, C, H, W) in [-1, 1] and their batch -> one value each; mean and deviation are given. The
    first `keep` pictures are kept to be looked at.
    """

    sets: Mapping[str, SetMetric] = field(default_factory=dict)
    extractor: Extractor | None = None
    pictures: Mapping[str, PictureMetric] = field(default_factory=dict)
    keep: int = 64

    @property
    def needs_reference(self) -> bool:
        """Return whether any figure is a comparison of sets."""
        return any(metric.needs_reference for metric in self.sets.values())

    def check(self, count: int) -> None:
        """Raise UserError, before anything is read or drawn, for what `check_count` refuses.

        Also for an extractor without weights, or without what a figure needs.
        """
        self.check_count(count)
        self._check_features(None)

    def check_count(self, count: int) -> None:
        """Raise UserError if so many samples are too few, or nothing is asked; no weights are needed to tell."""
        if not self.sets and not self.pictures:
            raise UserError("evaluation: no metrics; name some")
        for name, metric in self.sets.items():
            if self.extractor is None:
                raise UserError(f"{name}: is measured on features; name an extractor")
            if count < metric.minimum:
                raise UserError(f"{name}: needs {metric.minimum} samples or more, there are {count}")

    def check_reference(self, reference: Referenced | None) -> None:
        """Raise UserError for a reference that is absent, has too few pictures, or lacks what a figure needs."""
        for name, metric in self.sets.items():
            if not metric.needs_reference:
                continue
            if reference is None:
                raise UserError(f"{name}: needs a reference; name a data set, a folder or an .npz file")
            number = reference.reference.count
            if number is not None and number < metric.minimum:
                raise UserError(f"{name}: needs {metric.minimum} pictures of reference or more, there are {number}")
        if reference is not None and self.extractor is not None:
            made_by = reference.reference.made_by
            if made_by not in (None, maker(self.extractor)):
                raise UserError(f"--reference: was made by the extractor {made_by}, not by {maker(self.extractor)}")
            self._check_features(reference)

    def check_pictures(self, batch: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        """Raise UserError if a figure of pictures cannot be had of one of `shape` (C, H, W) with the batch of one."""
        for name, metric in self.pictures.items():
            try:
                values = metric(torch.full((1, *shape), -1.0), _Entries(name, batch))
            except TypeError as error:
                raise UserError(f"{name}: cannot be called with pictures and their batch ({error})") from error
            if not isinstance(values, Tensor) or values.shape != (1,):
                raise UserError(f"{name}: does not give one value for each picture")

    def figures(self, images: Tensor, batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Return each figure of pictures by its name, (B,)."""
        for name, metric in self.pictures.items():
            yield name, metric(images, _Entries(name, batch)).float()

    def record(self) -> dict[str, Any]:
        """Describe what is measured, as far as figures depend on it."""
        seen: dict[str, Any] = {"pixels": ROUNDING}
        if self.extractor is not None:
            seen["extractor"] = {
                "name": self.extractor.name, "sha256": self.extractor.hash, "resize": self.extractor.resize
            }  # fmt: skip
        seen["metrics"] = {name: asdict(metric) for name, metric in self.sets.items()} | self.record_of_pictures()
        return seen

    def record_of_pictures(self) -> dict[str, Any]:
        """Describe figures of pictures; what else they depend on is part of the name."""
        return {
            name: {"sha256": metric.hash} if isinstance(metric, Weighted) else {}
            for name, metric in self.pictures.items()
        }

    def _check_features(self, reference: Referenced | None) -> None:
        problems = []
        for metric in self.sets.values():
            compared = reference.reference if reference is not None and metric.needs_reference else None
            try:
                metric.check(self._black, compared)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(dict.fromkeys(problems)))

    @cached_property
    def _black(self) -> Features:
        return self.extractor(torch.zeros(1, 3, _SIDE, _SIDE, dtype=torch.uint8))
