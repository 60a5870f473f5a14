"""Captions that are lists of tags, `cat, hat, smile`: their order says nothing, so that each epoch has another one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.bounds import Fraction, Natural
from ldm.data.core.transforms import SampleKey
from ldm.errors import UserError

__all__ = ["ShuffledTags"]

_STREAM = 7  # separates these draws from those of the crop and of derived data sets


@dataclass(frozen=True)
class ShuffledTags:
    """Shuffle the tags of a caption, and leave some of them out, as a function of the `SampleKey` alone.

    Args:
        keep: the first tags, which stay in their places.
        drop: probability with which each other tag is left out; of a caption with tags one always remains.
        separator: of the tags.
    """

    keep: Natural = 0
    drop: Fraction = 0.0
    separator: str = ","

    def __post_init__(self) -> None:
        if not self.separator:
            raise UserError("ShuffledTags: separator is empty; give what stands between two tags, such as ','")

    def __call__(self, caption: str, key: SampleKey) -> str:
        """Return the caption of an item of an epoch."""
        tags = [tag.strip() for tag in caption.split(self.separator) if tag.strip()]
        rng = np.random.default_rng([key.seed, key.epoch, key.index, _STREAM])
        fixed, others = tags[: self.keep], rng.permutation(tags[self.keep :]).tolist()
        kept = [tag for tag, draw in zip(others, rng.random(len(others)), strict=True) if draw >= self.drop]
        return f"{self.separator.strip()} ".join([*fixed, *kept] or others[:1])
