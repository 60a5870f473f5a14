"""Whether samples compose: the nearest real image of the style that was asked for shows the asked concept.

Right at k if an image of the concept is among the k nearest of all real images of that style; by chance k of their
number are. Neither the model nor the features need know a concept by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import UserError

__all__ = ["Gallery", "Label", "shares_right"]


class Label(NamedTuple):
    """What an image shows, and in which style."""

    concept: str
    style: str


@dataclass(frozen=True, eq=False)
class Gallery:
    """Features (N, d) of real images, and the label of each."""

    features: Tensor
    labels: Sequence[Label]

    def ranks(self, features: Tensor, asked: Sequence[Label]) -> Tensor:
        """Return how many images of the asked style are nearer than the nearest of the asked concept, int64 (M,).

        features: (M, d) of the samples. UserError where the style has no image of the concept.
        """
        ranks = torch.zeros(len(asked), dtype=torch.int64)
        for style in dict.fromkeys(label.style for label in asked):
            mine = [i for i, label in enumerate(asked) if label.style == style]
            real = [i for i, label in enumerate(self.labels) if label.style == style]
            numbers = {concept: i for i, concept in enumerate(dict.fromkeys(self.labels[j].concept for j in real))}
            if missing := [asked[i].concept for i in mine if asked[i].concept not in numbers]:
                raise UserError(f"{missing[0]!r} in the style {style!r}: no real image shows it")
            wanted, there = (
                torch.tensor([numbers[label.concept] for label in labels])
                for labels in ([asked[i] for i in mine], [self.labels[j] for j in real])
            )
            right = wanted[:, None] == there  # (asked, real)
            distance = torch.cdist(features[mine], self.features[real])
            nearest = distance.masked_fill(~right, torch.inf).amin(1, keepdim=True)
            ranks[mine] = (distance < nearest).sum(1)
        return ranks

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance of the nearest image of any style, and its position, (M,) each."""
        return torch.cdist(features, self.features).min(1)

    def between_styles(self) -> dict[str, float]:
        """Judge the real images of each style as if they were samples of another: "a as b" -> share right at 1.

        It shows how far the features tell concepts apart whatever the style: less than of samples in the style itself.
        """
        there, shares = set(self.labels), {}
        styles = sorted({label.style for label in self.labels})
        for style, other in ((a, b) for a in styles for b in styles if a != b):
            rows = [
                i for i, (concept, own) in enumerate(self.labels) if own == style and Label(concept, other) in there
            ]
            if rows:
                asked = [Label(self.labels[i].concept, other) for i in rows]
                shares[f"{style} as {other}"] = shares_right(self.ranks(self.features[rows], asked))[1]
        return shares


def shares_right(ranks: Tensor, within: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Return the share of samples that are right at 1, at 5."""
    return {k: (ranks < k).double().mean().item() for k in within}
