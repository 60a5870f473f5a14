"""Detect the coloured shapes of an image, to count how often a model draws what its caption says.

The image alone decides; nothing of the model is known. A pixel is background + share * (colour - background): for each
palette colour the share follows by projection, and the colour with the least residual is chosen. Connected pixels with
a share above 1/2 make an object. Its shape is the one whose ideal figure, of the same centroid and area, overlaps the
shares best: sum min / sum max, the soft intersection over union. A figure that overlaps no ideal well, or has none of
the colours, stays an object, but of unknown shape or colour, and makes the image wrong. Positions are fractions of the
canvas; x to the right, y downwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.toy.captions import SHAPES, Description, Thing, parse
from ldm.toy.shapes import HALF_EXTENTS, PALETTE, RADII, covered

UNKNOWN = "unknown"
MIN_AREA = 0.2 * np.pi * RADII["small"][0] ** 2  # of the canvas: less is a speck, not an object
MIN_OVERLAP = 0.8  # two different shapes of one area overlap by 0.83 at most; drawn ones by more than 0.9
MAX_RESIDUAL = 0.2  # of a colour, RGB in [0, 1]
SIZE_LIMITS = [0.5 * (RADII[a][1] + RADII[b][0]) for a, b in pairwise(RADII)]  # between the sizes


@dataclass(frozen=True)
class Object:
    """One found object: box as left, top, right, bottom; `radius` that of the disc of its area; `overlap` its fit."""

    shape: str
    colour: str
    size: str
    box: tuple[float, float, float, float]
    centre: tuple[float, float]
    radius: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """What of a caption is drawn.

    count: as many objects as said; shapes, colours: the same ones, in any combination; objects: shape and colour
    together; sizes: those mentioned; relation: who stands where. The last two need the objects.
    """

    count: bool
    shapes: bool
    colours: bool
    objects: bool
    sizes: bool
    relation: bool

    @property
    def is_right(self) -> bool:
        """Return whether all is as said."""
        return all(astuple(self))


def detect(image: Tensor | np.ndarray) -> list[Object]:
    """Find the objects of an image (3, H, W) in [-1, 1], largest first. Raises ValueError for another shape."""
    return sorted((item for _, item in _found(image)), key=lambda item: -item.radius)


def segment(image: Tensor | np.ndarray) -> Tensor:
    """Return the class of each pixel of an image (3, H, W) in [-1, 1]: int64 (H, W), 0 background, then SHAPES.

    Objects of unknown shape have the number after the last shape's. Raises ValueError for another shape of image.
    """
    classes = torch.zeros(image.shape[-2:], dtype=torch.long)
    for mask, item in _found(image):
        classes[torch.from_numpy(mask)] = 1 + (*SHAPES, UNKNOWN).index(item.shape)
    return classes


def _found(image: Tensor | np.ndarray) -> Iterator[tuple[np.ndarray, Object]]:
    """Yield the objects of an image, each with the pixels (H, W) of which it covers more than half."""
    pixels = torch.as_tensor(image).detach().cpu().float().numpy()
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"image has shape {pixels.shape}; expected (3, H, W)")
    pixels = np.clip((pixels + 1) / 2, 0, 1)
    colour, share, residual = _unmix(pixels)  # (H, W) each
    for index in range(len(PALETTE)):
        for mask in _components((colour == index) & (share > 0.5)):
            if mask.mean() >= MIN_AREA:
                full = np.quantile(share[mask], 0.8)  # a paler or darker colour than the palette's still covers fully
                soft = np.where(_grown(mask) & ((colour == index) | (share < 0.5)), np.clip(share / full, 0, 1), 0)
                known = np.median(residual[mask]) <= MAX_RESIDUAL
                yield mask, _measure(soft, list(PALETTE)[index] if known else UNKNOWN)


def verdict(image: Tensor | np.ndarray, caption: str) -> Verdict:
    """Compare an image (3, H, W) in [-1, 1] with a caption of `ldm.toy.captions`."""
    description, objects = parse(caption), detect(image)
    things = description.things
    kinds = {(item.shape, item.colour): item for item in objects}
    matched = [kinds.get((thing.shape, thing.colour)) for thing in things]
    complete = None not in matched and len(objects) == len(things)
    return Verdict(
        count=len(objects) == len(things),
        shapes=sorted(item.shape for item in objects) == sorted(thing.shape for thing in things),
        colours=sorted(item.colour for item in objects) == sorted(thing.colour for thing in things),
        objects=complete,
        sizes=complete and all(_has_size(item, thing) for item, thing in zip(matched, things, strict=True)),
        relation=complete and _stand_as_said(matched, description),
    )


def caption_is_drawn(image: Tensor | np.ndarray, caption: str) -> bool:
    """Return whether an image (3, H, W) in [-1, 1] shows exactly what its caption says."""
    return verdict(image, caption).is_right


def score(images: Iterable[Tensor | np.ndarray], captions: Iterable[str]) -> dict[str, float]:
    """Return the fraction of right images, "right", and of each part of the verdict. ValueError without images."""
    verdicts = [verdict(image, caption) for image, caption in zip(images, captions, strict=True)]
    if not verdicts:
        raise ValueError("score: there are no images")
    shares = {field.name: float(np.mean([getattr(v, field.name) for v in verdicts])) for field in fields(Verdict)}
    return {"right": float(np.mean([v.is_right for v in verdicts])), **shares}


def _unmix(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each pixel the index of its colour, the share of it, and how far the mixture is off: (H, W) each."""
    background = np.median(pixels, axis=(1, 2))
    offset = pixels - background[:, None, None]  # (3, H, W)
    directions = np.array(list(PALETTE.values())) - background  # (K, 3)
    shares = np.einsum("kc,chw->khw", directions, offset) / np.square(directions).sum(1)[:, None, None]
    mixtures = directions[:, :, None, None] * np.clip(shares, 0, 1)[:, None]  # (K, 3, H, W)
    residuals = np.sqrt(np.square(offset - mixtures).sum(1))  # (K, H, W)
    best = residuals.argmin(0)
    return best, np.take_along_axis(shares, best[None], 0)[0], residuals.min(0)


def _grown(mask: np.ndarray) -> np.ndarray:
    """Add the four neighbours of each pixel."""
    padded = np.pad(mask, 1)
    return padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the 4-connected components of a mask (H, W)."""
    rest = mask.copy()
    while rest.any():
        part = np.zeros_like(rest)
        part.flat[rest.argmax()] = True
        while True:
            larger = _grown(part) & rest
            if (larger == part).all():
                break
            part = larger
        rest &= ~part
        yield part


def _measure(share: np.ndarray, colour: str) -> Object:
    """Measure one object from the shares (H, W) that it covers."""
    height, width = share.shape
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    total = share.sum()
    centre = np.array([(share.sum(0) * x).sum(), (share.sum(1) * y).sum()]) / total
    radius = float(np.sqrt(total / share.size / np.pi))
    overlaps = {}
    for shape in SHAPES:
        half = radius * np.array(HALF_EXTENTS[shape])
        # A triangle's centroid lies a third of its height above its base.
        middle = centre - np.array([0, half[1] / 3 if shape == "triangle" else 0])
        ideal = covered(shape, middle, half, x, y)
        overlaps[shape] = float(np.minimum(share, ideal).sum() / np.maximum(share, ideal).sum())
    shape = max(overlaps, key=overlaps.get)
    columns, rows = np.flatnonzero((share > 0.5).any(0)), np.flatnonzero((share > 0.5).any(1))
    return Object(
        shape=shape if overlaps[shape] >= MIN_OVERLAP else UNKNOWN,
        colour=colour,
        size=list(RADII)[int(np.searchsorted(SIZE_LIMITS, radius))],
        box=(columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height),
        centre=(float(centre[0]), float(centre[1])),
        radius=radius,
        overlap=overlaps[shape],
    )


def _has_size(item: Object, thing: Thing) -> bool:
    return thing.size is None or thing.size == item.size


def _stand_as_said(matched: list[Object], description: Description) -> bool:
    """Return whether the second thing stands mainly in the said direction, and the third beyond both others' boxes."""
    if description.relation is None:
        return True
    first, second = matched[:2]
    along, across = _offset(first, second, description.relation)
    if along <= abs(across):
        return False
    if description.side is None:
        return True
    return all(_is_beyond(matched[2], other, description.side) for other in matched[:2])


def _offset(item: Object, other: Object, relation: str) -> tuple[float, float]:
    """Return how far `item` stands in the direction of the relation from `other`, and how far across it."""
    dx, dy = item.centre[0] - other.centre[0], item.centre[1] - other.centre[1]
    return {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]


def _is_beyond(item: Object, other: Object, side: str) -> bool:
    """Return whether the centre of `item` lies beyond the box of `other` on this side."""
    left, top, right, bottom = other.box
    x, y = item.centre
    return {"left": x < left, "right": x > right, "above": y < top, "below": y > bottom}[side]
