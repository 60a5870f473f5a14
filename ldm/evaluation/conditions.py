"""What samples are conditioned on in an evaluation: chosen by name, a function of the sample's position alone.

How classes are drawn changes FID (5.08 and 4.32 of one model, see pitfalls of the literature), so the name is part of
every result: `data` (as the validation set has them), `balanced` (each class as often), `uniform` (drawn at random).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ldm.evaluation.image_sets import PictureSet


class Conditions(Protocol):
    """Return the batch that samples are conditioned on and judged by; `name` says how it is chosen.

    sha256: of what it is chosen from, None for nothing.
    """

    name: str
    sha256: str | None

    def __call__(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return the batch of these positions."""


@dataclass(frozen=True)
class Unconditional:
    """Condition on nothing."""

    name: str = "none"
    sha256: None = None

    def __call__(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class DataConditions:
    """Take the items of a data set in turn, with everything that they have."""

    pictures: PictureSet

    @property
    def name(self) -> str:
        """Name the data set and how many of its items are used."""
        return f"data ({self.pictures.name}, {len(self.pictures)} items)"

    @property
    def sha256(self) -> str:
        """Hash everything that these items have."""
        return self.pictures.data_digest()

    def __call__(self, positions: Sequence[int]) -> dict[str, Any]:
        """Collate the items of these positions."""
        return self.pictures.batch(positions)


@dataclass(frozen=True)
class BalancedClasses:
    """Take each of the labels in turn."""

    key: str
    labels: tuple[int, ...]
    name: str = "balanced"

    @property
    def sha256(self) -> str:
        """Hash key and labels."""
        return _of_labels(self.key, self.labels)

    def __call__(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return labels (B,)."""
        return {self.key: torch.tensor([self.labels[p % len(self.labels)] for p in positions])}


@dataclass(frozen=True)
class UniformClasses:
    """Draw each label at random, from (seed, position)."""

    key: str
    labels: tuple[int, ...]
    seed: int = 0
    name: str = "uniform"

    @property
    def sha256(self) -> str:
        """Hash key and labels."""
        return _of_labels(self.key, self.labels)

    def __call__(self, positions: Sequence[int]) -> dict[str, Any]:
        """Return labels (B,)."""
        draws = [np.random.default_rng([self.seed, p]).integers(len(self.labels)) for p in positions]
        return {self.key: torch.tensor([self.labels[draw] for draw in draws])}


def _of_labels(key: str, labels: tuple[int, ...]) -> str:
    return hashlib.sha256(repr((key, labels)).encode()).hexdigest()
