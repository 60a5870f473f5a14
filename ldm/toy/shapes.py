"""Generated scenes of one to three coloured shapes on a light canvas, with everything a conditioner may ask for.

A scene is a pure function of (seed, split, index). Shapes are drawn from their signed distances d in pixels, with
coverage clip(1/2 - d, 0, 1), that is box-filtered edges; areas do not depend on the shape, so that size says nothing
about it. The canvas has side 1; x runs to the right and y downwards. Captions: see `shape_captions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.bounds import Count, Fraction, Natural, Size
from ldm.errors import UserError
from ldm.toy.captions import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Description,
    Thing,
    held_out,
    held_out_captions,
    is_held_out,
)

__all__ = [
    "HALF_EXTENTS",
    "MAX_OBJECTS",
    "PALETTE",
    "RADII",
    "Scene",
    "Shapes",
    "covered",
    "held_out",
    "held_out_captions",
    "render",
]

MAX_OBJECTS = 3
PALETTE = {  # RGB in [0, 1]
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.30, 0.92),
    "yellow": (0.96, 0.82, 0.08),
    "purple": (0.60, 0.12, 0.72),
    "black": (0.08, 0.08, 0.08),
}
HALF_EXTENTS = {"circle": (1.0, 1.0), "square": (0.886, 0.886), "triangle": (1.3, 1.208)}  # of a radius; area pi
RADII = {"small": (0.095, 0.105), "medium": (0.13, 0.142), "large": (0.163, 0.172)}  # medium goes without saying
MARGIN, GAP = 0.02, 0.06  # free canvas around the scene and between two boxes
JITTER = 0.05  # how far things stand from the middle, across the axis of their relation
# How often each of RELATIONS is said. "A left of B" and "B right of A" show the same: with equal shares neither the
# order of words nor the relation says anything by itself, and a model long reads captions as bags of words.
RELATION_SHARES = (0.375, 0.125, 0.375, 0.125)
LOOSE_JITTER = 0.12  # the same where no relation says anything
FIELDS = ("caption", "class_label", "boxes", "box_labels", "segmentation")
_SPLITS = ("train", "validation")
_AXIS = {"left": 0, "right": 0, "above": 1, "below": 1}


@dataclass(frozen=True)
class Scene:
    """A description with its boxes: centres (N, 2) and half extents (N, 2), as fractions of the canvas."""

    description: Description
    centres: np.ndarray
    halves: np.ndarray

    def boxes(self) -> np.ndarray:
        """Return boxes (N, 4): left, top, width, height in [0, 1]."""
        return np.concatenate([self.centres - self.halves, 2 * self.halves], axis=1).astype(np.float32)


class Shapes(Dataset):
    """Generate scenes; a map-style dataset.

    Items: `image` float32 (3, S, S) in [-1, 1]; `caption` str; `class_label` int in [0, 18), shape and colour of the
    thing named first; `boxes` float32 (3, 4) as left, top, width, height in [0, 1], zeros beyond the last thing;
    `box_labels` int64 (3,) in the same numbering, -1 beyond the last; `segmentation` int64 (S, S), 0 for the
    background, then the shapes.

    `fields` says which of these go beside the image; `size_words` is the share of things that are small
    or large, and said to be. `split`
    "train" never shows a held-out caption; "validation" shows of captions with several things only those.
    Raises UserError for values outside the allowed ones.
    """

    def __init__(
        self,
        num_samples: Count,
        size: Size = 32,
        num_objects: tuple[Natural, Natural] = (1, 3),
        seed: int = 0,
        split: str = "train",
        size_words: Fraction = 0.25,
        fields: Sequence[str] = FIELDS,
    ) -> None:
        fewest, most = num_objects
        if split not in _SPLITS:
            raise UserError(f"Shapes: split {split!r} is not one of {', '.join(_SPLITS)}")
        if not 1 <= fewest <= most <= MAX_OBJECTS:
            raise UserError(f"Shapes: num_objects {list(num_objects)} is not a range within 1..{MAX_OBJECTS}")
        unknown = sorted(set(fields) - set(FIELDS))
        if unknown:
            raise UserError(f"Shapes: fields {', '.join(unknown)} unknown; known are {', '.join(FIELDS)}")
        if num_samples < 0 or size < 8 or not 0 <= size_words <= 1:
            raise UserError("Shapes: needs num_samples >= 0, size >= 8 and 0 <= size_words <= 1")
        self.num_samples, self.size, self.seed, self.split = num_samples, size, seed, split
        self.num_objects, self.size_words, self.fields = (fewest, most), size_words, tuple(fields)
        has_labels = {"class_label", "box_labels"} & set(fields)
        self.class_names = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS] if has_labels else []

    def __len__(self) -> int:
        return self.num_samples

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Draw the scene of an index; the generator goes on to draw its colours.

        Raises IndexError outside 0..len - 1.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        rng = np.random.Generator(np.random.Philox(key=[2 * self.seed + _SPLITS.index(self.split), index]))
        count = int(rng.integers(self.num_objects[0], self.num_objects[1] + 1))
        while True:
            description = self._describe(count, rng)
            if count == 1 or is_held_out(description) == (self.split == "validation"):
                return _arrange(description, rng), rng

    def _describe(self, count: int, rng: np.random.Generator) -> Description:
        kinds = rng.choice(len(SHAPES) * len(COLOURS), count, replace=False)
        sizes, told = rng.integers(0, len(SIZES), count), rng.random(count) < self.size_words
        things = tuple(
            Thing(SHAPES[kind // len(COLOURS)], COLOURS[kind % len(COLOURS)], SIZES[size] if tell else None)
            for kind, size, tell in zip(kinds, sizes, told, strict=True)
        )
        relation = list(RELATIONS)[rng.choice(4, p=RELATION_SHARES)] if count > 1 else None
        side = None
        if count > 2:
            side = ("above", "below")[rng.integers(2)] if _AXIS[relation] == 0 else ("left", "right")[rng.integers(2)]
        return Description(things, relation, side)

    def __getitem__(self, index: int) -> dict:
        scene, rng = self.scene(index)
        item = {"image": torch.from_numpy(render(scene, self.size, rng))}
        return item | {field: _FIELD_MAKERS[field](scene, self.size) for field in self.fields}


def _arrange(description: Description, rng: np.random.Generator) -> Scene:
    """Place the things so that the relation is clear-cut: boxes never overlap along the axis of the relation."""
    radii = np.array([rng.uniform(*RADII[thing.size or "medium"]) for thing in description.things])
    halves = np.array([HALF_EXTENTS[thing.shape] for thing in description.things]) * radii[:, None]
    if len(halves) == 1:
        return Scene(description, 0.5 + rng.uniform(-LOOSE_JITTER, LOOSE_JITTER, (1, 2)), halves)
    centres = 0.5 + rng.uniform(-JITTER, JITTER, halves.shape)
    axis = _AXIS[description.relation]
    order = [0, 1] if description.relation in ("left", "above") else [1, 0]
    centres[order, axis] = _in_a_row(halves[order, axis], rng)
    if len(halves) == 3:
        extents = np.array([halves[:2, 1 - axis].max(), halves[2, 1 - axis]])
        order = [1, 0] if description.side in ("left", "above") else [0, 1]
        rows = np.empty(2)
        rows[order] = _in_a_row(extents[order], rng)
        centres[:, 1 - axis] = rows[[0, 0, 1]]
        centres[2, axis] = 0.5 + rng.uniform(-LOOSE_JITTER, LOOSE_JITTER)
    return Scene(description, centres, halves)


def _in_a_row(halves: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return centres (2,) of two extents side by side on the unit interval; the free room is shared about evenly."""
    room = 1 - 2 * MARGIN - GAP - 2 * halves.sum()
    before, after = MARGIN + room * rng.uniform(0.2, 0.4, 2)
    return np.array([before + halves[0], 1 - after - halves[1]])


def render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene with slightly varying colours: float32 (3, S, S) in [-1, 1]."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    light, tilt = rng.uniform(0.88, 0.96), rng.uniform(-0.03, 0.03, 2).astype(np.float32)
    shade = (grid - 0.5)[None, :] * tilt[0] + (grid - 0.5)[:, None] * tilt[1]  # (S, S)
    tints = rng.uniform(-0.03, 0.03, (len(scene.centres) + 1, 3)).astype(np.float32)
    image = shade + (light + tints[0] / 3)[:, None, None].astype(np.float32)  # (3, S, S)
    for thing, coverage, tint in zip(scene.description.things, _coverages(scene, size), tints[1:], strict=True):
        colour = np.asarray(PALETTE[thing.colour], np.float32) + tint
        image += coverage * (colour[:, None, None] - image)
    return (np.clip(image, 0, 1) * 2 - 1).astype(np.float32)


def _coverages(scene: Scene, size: int) -> Iterator[np.ndarray]:
    """Yield (S, S) for each thing."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    for thing, centre, half in zip(scene.description.things, scene.centres, scene.halves, strict=True):
        yield covered(thing.shape, centre.astype(np.float32), half.astype(np.float32), grid, grid)


def _labels(scene: Scene) -> list[int]:
    things = scene.description.things
    return [SHAPES.index(thing.shape) * len(COLOURS) + COLOURS.index(thing.colour) for thing in things]


def _padded_boxes(scene: Scene, size: int) -> torch.Tensor:
    boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
    boxes[: len(scene.centres)] = scene.boxes()
    return torch.from_numpy(boxes)


def _padded_labels(scene: Scene, size: int) -> torch.Tensor:
    labels = _labels(scene)
    return torch.tensor(labels + [-1] * (MAX_OBJECTS - len(labels)))


def _segmentation(scene: Scene, size: int) -> torch.Tensor:
    """Return int64 (S, S): 0 the background, then the shapes."""
    classes = np.zeros((size, size), np.int64)
    for thing, coverage in zip(scene.description.things, _coverages(scene, size), strict=True):
        classes[coverage > 0.5] = 1 + SHAPES.index(thing.shape)
    return torch.from_numpy(classes)


def covered(shape: str, centre: np.ndarray, half: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which share of each pixel a shape covers, (H, W) in [0, 1].

    centre (2,) and half extents (2,) of its box; x (W,) and y (H,) the centres of pixels, evenly spaced by 1 / size.
    """
    distance = _DISTANCES[shape](x[None, :] - centre[0], y[:, None] - centre[1], half)
    return np.clip(0.5 - distance / (x[1] - x[0]), 0, 1)


def _circle(x: np.ndarray, y: np.ndarray, half: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - half[0]


def _square(x: np.ndarray, y: np.ndarray, half: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) - half[0], np.abs(y) - half[1])


def _triangle(x: np.ndarray, y: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Distance to the sides of an isosceles triangle that points upwards."""
    normal = np.array([2 * half[1], half[0]]) / np.hypot(2 * half[1], half[0])
    return np.maximum(np.abs(x) * normal[0] - (y + half[1]) * normal[1], y - half[1]).astype(np.float32)


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle}
_FIELD_MAKERS = {
    "caption": lambda scene, size: scene.description.caption(),
    "class_label": lambda scene, size: _labels(scene)[0],
    "boxes": _padded_boxes,
    "box_labels": _padded_labels,
    "segmentation": _segmentation,
}
