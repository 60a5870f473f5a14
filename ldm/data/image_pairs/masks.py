"""Random holes for inpainting, as LaMa draws them (Suvorov et al. 2021, arXiv 2109.07161; appendix E.2.2 of the paper).

A mask is a few thick polylines (strokes), or a few boxes. A stroke starts anywhere and has 1 to 5 segments in the
directions (sin a, cos a), a = 0, 1 ... turns - 1 radians, with the opposite sign in every other stroke; its ends stay
inside the image, so that strokes also run along the borders. LaMa counts pixels of 256 x 256 crops; here all lengths
are fractions of the shorter side, so that 32 x 32 images get the same masks, only coarser.

Legend: mask (H, W) bool, True = hole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldm.bounds import Natural
from ldm.errors import UserError

__all__ = ["MASKS", "Boxes", "DrawMask", "RandomMask", "Strokes", "mixed"]

DrawMask = Callable[[int, int, np.random.Generator], np.ndarray]  # height, width, generator -> (H, W) bool
Range = tuple[float, float]
_MOST_SEGMENTS = 5
_ATTEMPTS = 100
_SIDE = 256  # of the images that LaMa's numbers are meant for


@dataclass(frozen=True)
class Strokes:
    """Draw `count` strokes; width and length of their segments are ranges in fractions of the shorter side."""

    count: tuple[int, int]
    width: Range
    length: Range
    turns: Natural = 4

    def __call__(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Draw a mask (H, W)."""
        mask, unit = np.zeros((height, width), bool), min(height, width)
        for number in range(_whole(self.count, rng)):
            start = np.array([rng.uniform(0, width), rng.uniform(0, height)])
            for _ in range(int(rng.integers(1, _MOST_SEGMENTS + 1))):
                angle = int(rng.integers(self.turns)) * (-1 if number % 2 == 0 else 1)
                reach = unit * rng.uniform(*self.length)
                step = reach * np.array([np.sin(angle), np.cos(angle)])
                end = np.clip(start + step, 0, (width, height))
                _draw_segment(mask, start, end, unit * rng.uniform(*self.width) / 2)
                start = end
        return mask


@dataclass(frozen=True)
class Boxes:
    """Draw `count` boxes with sides in a range, `margin` away from the borders; fractions of the shorter side."""

    count: tuple[int, int]
    side: Range
    margin: float = 0.0

    def __call__(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Draw a mask (H, W)."""
        mask, unit = np.zeros((height, width), bool), min(height, width)
        margin = int(unit * self.margin)
        for _ in range(_whole(self.count, rng)):
            sides = [min(max(1, round(unit * rng.uniform(*self.side))), most - 2 * margin) for most in (height, width)]
            top, left = (
                int(rng.integers(margin, most - margin - side + 1))
                for most, side in zip((height, width), sides, strict=True)
            )
            mask[top : top + sides[0], left : left + sides[1]] = True
        return mask


@dataclass(frozen=True)
class RandomMask:
    """Draw strokes or, with probability `box_share`, boxes, until the hole is between 0 and `most` of the image.

    Raises UserError for probabilities outside [0, 1], and if no hole of such an area comes up.
    """

    strokes: DrawMask
    boxes: DrawMask | None = None
    box_share: float = 0.0
    most: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.box_share <= 1 or not 0 < self.most <= 1 or (self.boxes is None and self.box_share > 0):
            raise UserError(
                f"RandomMask: needs boxes for box_share={self.box_share} in [0, 1], and most={self.most} in (0, 1]"
            )

    def __call__(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Draw a mask (H, W) with at least one hole and one known pixel."""
        for _ in range(_ATTEMPTS):
            kind = self.boxes if rng.random() < self.box_share else self.strokes
            mask = kind(height, width, rng)
            if 0 < mask.mean() <= self.most and not mask.all():
                return mask
        raise UserError(
            f"RandomMask: none of {_ATTEMPTS} masks of {height}x{width} covers at most {self.most:.0%}; "
            "raise most, or draw smaller ones"
        )


def _pixels(least: float, most: float) -> Range:
    return least / _SIDE, most / _SIDE


def _whole(limits: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(limits[0], limits[1] + 1))


def _draw_segment(mask: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> None:
    """Set the pixels whose centres are within `radius` of a segment, at least half a diagonal: no stroke vanishes."""
    radius = max(radius, np.sqrt(0.5))
    low = np.floor(np.minimum(start, end) - radius).astype(int).clip(0)
    high = np.ceil(np.maximum(start, end) + radius).astype(int)  # slices end at the border by themselves
    window = mask[low[1] : high[1], low[0] : high[0]]
    rows, columns = np.indices(window.shape)
    x, y = columns + low[0] + 0.5 - start[0], rows + low[1] + 0.5 - start[1]
    along = end - start
    share = np.clip((x * along[0] + y * along[1]) / max(float(along @ along), 1e-12), 0, 1)
    window |= (x - share * along[0]) ** 2 + (y - share * along[1]) ** 2 <= radius**2


_LARGE_STROKES = Strokes((1, 5), _pixels(5, 105), _pixels(10, 210))
_LARGE_BOXES = Boxes((1, 4), _pixels(30, 150), 10 / _SIDE)
_BOX_SHARE = 0.3 / 1.3  # LaMa draws strokes in 10 times of 13
_MIXTURE = (
    RandomMask(_LARGE_STROKES, Boxes((1, 3), _pixels(30, 150), 10 / _SIDE), _BOX_SHARE),
    RandomMask(Strokes((4, 5), _pixels(5, 55), _pixels(10, 110)), Boxes((1, 5), _pixels(10, 50)), _BOX_SHARE),
    RandomMask(Strokes((4, 50), _pixels(5, 15), _pixels(10, 50))),
)


def mixed(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a thick, medium or thin mask (H, W) with equal probability."""
    return _MIXTURE[int(rng.integers(len(_MIXTURE)))](height, width, rng)


# LaMa's three kinds; boxes alone; and what LaMa's models are trained on, of which the last two can cover 95%.
MASKS: dict[str, DrawMask] = {
    "mixed": mixed,
    **dict(zip(("thick", "medium", "thin"), _MIXTURE, strict=True)),
    "boxes": RandomMask(_LARGE_BOXES, _LARGE_BOXES, 1.0, most=0.95),
    "lama": RandomMask(_LARGE_STROKES, _LARGE_BOXES, 0.5, most=0.95),
}
