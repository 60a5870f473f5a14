"""Layouts as token sequences: the boxes or centre points of objects, for layout-to-image synthesis (section 4.3.1).

A point (x, y) in [0, 1]^2 is one of S*S grid nodes, token round(y (S-1)) S + round(x (S-1)) with S = floor(sqrt(V)) for
a vocabulary of V tokens. An object is its class token followed by its points; absent objects are filled with token V-1.
The class token is category + num_classes * flags, so that each combination of attributes has its own tokens.

Boxes are (left, top, width, height) as fractions of the image; x runs to the right, y downwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ldm.bounds import Count
from ldm.errors import UserError

__all__ = ["FULL_IMAGE", "Box", "BoxTokenizer", "CentrePointTokenizer", "LayoutObject", "Layout", "visible_objects"]


class Box(NamedTuple):
    """A rectangle in fractions of the image."""

    left: float
    top: float
    width: float
    height: float

    def flipped(self) -> Box:
        """Return the box in the horizontally flipped image."""
        return self._replace(left=1 - (self.left + self.width))

    def overlap(self, other: Box) -> float:
        """Return the area of the intersection with another box."""
        width = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        height = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def relative_to(self, crop: Box) -> Box:
        """Return the box in fractions of a crop.

        The right and lower sides are clipped to the crop; the left and upper sides are moved to it without making the
        box smaller. The released layout models were trained on such boxes.
        """
        left = min(max((self.left - crop.left) / crop.width, 0.0), 1.0)
        top = min(max((self.top - crop.top) / crop.height, 0.0), 1.0)
        width = min(self.width / crop.width, 1 - left)
        height = min(self.height / crop.height, 1 - top)
        return Box(left, top, width, height)


FULL_IMAGE = Box(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class LayoutObject:
    """One annotated object: category 0..num_classes-1, its box, and the attributes of some data sets."""

    category: int
    box: Box
    is_group: bool = False
    is_occluded: bool = False
    is_depiction: bool = False
    is_inside: bool = False


class Layout(NamedTuple):
    """A decoded layout: (class token, box or point) of each object, and the crop if it is encoded."""

    objects: list[tuple[int, tuple[float, ...]]]
    crop: Box | None


class Shuffler(Protocol):
    """The generator of the order of objects: a `random.Random`, or the module `random`."""

    def shuffle(self, x: list) -> None:
        """Permute a list in place."""


def visible_objects(objects: Sequence[LayoutObject], crop: Box) -> list[LayoutObject]:
    """Return the objects that intersect the crop."""
    return [item for item in objects if item.box.overlap(crop) > 0]


class LayoutTokenizer(ABC):
    """Encode objects as a fixed number of tokens, and decode them; a subclass encodes a box as points.

    `use_group` and `use_attributes` (occluded, depiction, inside) let the class token carry those flags; `encode_crop`
    keeps boxes in coordinates of the full image and appends two tokens of the crop box, else boxes are expressed in
    coordinates of the crop. Raises UserError for impossible sizes.
    """

    points_per_object: int

    def __init__(
        self,
        num_classes: Count,
        max_objects: Count,
        vocab_size: Count,
        encode_crop: bool = True,
        use_group: bool = True,
        use_attributes: bool = False,
    ) -> None:
        if num_classes < 1 or max_objects < 1 or num_classes >= vocab_size or vocab_size < 4:
            raise UserError(
                f"{type(self).__name__}: needs 1 <= num_classes={num_classes} < vocab_size={vocab_size}, "
                f"vocab_size >= 4 and max_objects={max_objects} >= 1"
            )
        self.num_classes, self.max_objects, self.vocab_size = num_classes, max_objects, vocab_size
        self.encode_crop, self.use_group, self.use_attributes = encode_crop, use_group, use_attributes

    @property
    def none_token(self) -> int:
        """Return the token of absent objects."""
        return self.vocab_size - 1

    @property
    def num_labels(self) -> int:
        """Count the class tokens: classes with each combination of flags."""
        return self.num_classes * (16 if self.use_attributes else 2 if self.use_group else 1)

    @property
    def num_sections(self) -> int:
        """Return S, the number of grid nodes per side."""
        return math.isqrt(self.vocab_size)

    @property
    def length(self) -> int:
        """Return the number of tokens of a layout."""
        return self.max_objects * (1 + self.points_per_object) + 2 * self.encode_crop

    def encode_point(self, x: float, y: float) -> int:
        """Return the token of the grid node nearest to a point in [0, 1]^2, halves to the even node."""
        last = self.num_sections - 1
        return int(round(y * last)) * self.num_sections + int(round(x * last))

    def decode_point(self, token: int) -> tuple[float, float]:
        """Return the (x, y) of a point token."""
        y, x = divmod(token, self.num_sections)
        return x / (self.num_sections - 1), y / (self.num_sections - 1)

    def encode_corners(self, box: Box) -> tuple[int, int]:
        """Return the tokens of the upper left and the lower right corner."""
        left, top, width, height = box
        return self.encode_point(left, top), self.encode_point(left + width, top + height)

    def decode_corners(self, upper_left: int, lower_right: int) -> Box:
        """Return the box between two point tokens."""
        (x0, y0), (x1, y1) = self.decode_point(upper_left), self.decode_point(lower_right)
        return Box(x0, y0, x1 - x0, y1 - y0)

    def encode_class(self, item: LayoutObject) -> int:
        """Return the class token: category + num_classes * (1 group + 2 occluded + 4 depiction + 8 inside)."""
        flags = int(self.use_group and item.is_group)
        if self.use_attributes:
            flags += 2 * item.is_occluded + 4 * item.is_depiction + 8 * item.is_inside
        return item.category + self.num_classes * flags

    def decode_class(self, token: int, box: Box = FULL_IMAGE) -> LayoutObject:
        """Return category and flags of a class token as an object with the given box."""
        flags, category = divmod(token, self.num_classes)
        attributes = flags if self.use_attributes else 0
        return LayoutObject(
            category,
            box,
            is_group=bool(flags & 1) and self.use_group,
            is_occluded=bool(attributes & 2),
            is_depiction=bool(attributes & 4),
            is_inside=bool(attributes & 8),
        )

    @abstractmethod
    def encode_box(self, box: Box) -> tuple[int, ...]:
        """Return the point tokens of a box."""

    @abstractmethod
    def decode_points(self, tokens: Sequence[int]) -> tuple[float, ...]:
        """Return the box or the point that point tokens encode."""

    def build(
        self,
        objects: Sequence[LayoutObject],
        crop: Box | None = None,
        flip: bool = False,
        rng: Shuffler | None = None,
    ) -> list[int]:
        """Encode a layout as `length` tokens.

        The first max_objects objects are shuffled by `rng` (None: keep the order), and those outside the crop dropped.
        flip: whether the image was flipped after cropping. Raises UserError for tokens outside the vocabulary.
        """
        crop = Box(*crop) if crop else FULL_IMAGE
        chosen = list(objects[: self.max_objects])
        if rng is not None:
            rng.shuffle(chosen)
        chosen = visible_objects(chosen, crop)
        frame = FULL_IMAGE if self.encode_crop else crop
        boxes = [item.box.relative_to(frame) for item in chosen]
        labels = [self.encode_class(item) for item in chosen]
        if flip:
            boxes, crop = [box.flipped() for box in boxes], crop.flipped()
        return self._sequence(labels, boxes, crop)

    def tokens(
        self, labels: Sequence[int], boxes: Sequence[Sequence[float]], crop: Sequence[float] | None = None
    ) -> list[int]:
        """Encode the objects of a batch entry, class tokens (N,) with -1 = absent and boxes (N, 4), as `length` tokens.

        crop (4,): None for the full image. Raises UserError for more than max_objects objects, unknown labels, and
        boxes outside the image.
        """
        present = [i for i, label in enumerate(labels) if label >= 0]
        largest = max((labels[i] for i in present), default=0)
        if len(present) > self.max_objects or largest >= self.num_labels:
            raise UserError(
                f"{type(self).__name__}: {len(present)} objects with labels up to {largest}, but max_objects="
                f"{self.max_objects} and num_classes={self.num_classes}; set both to those of the data set"
            )
        chosen = [Box(*boxes[i]) for i in present]
        return self._sequence([labels[i] for i in present], chosen, Box(*crop) if crop else FULL_IMAGE)

    def _sequence(self, labels: Sequence[int], boxes: Sequence[Box], crop: Box) -> list[int]:
        tokens: list[int] = []
        for label, box in zip(labels, boxes, strict=True):
            tokens += (label, *self.encode_box(box))
        tokens += [self.none_token] * (self.max_objects - len(labels)) * (1 + self.points_per_object)
        if self.encode_crop:
            tokens += self.encode_corners(crop)
        return self._checked(tokens)

    def _checked(self, tokens: list[int]) -> list[int]:
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise UserError(
                f"{type(self).__name__}: a token is outside 0..{self.vocab_size - 1}; boxes must lie in [0, 1], "
                f"categories in 0..{self.num_classes - 1}, and classes times flags must fit into the vocabulary"
            )
        return tokens

    def inverse_build(self, tokens: Sequence[int]) -> Layout:
        """Decode `length` tokens. Raises ValueError for another number of them."""
        if len(tokens) != self.length:
            raise ValueError(f"a layout has {self.length} tokens, not {len(tokens)}")
        tokens = [int(token) for token in tokens]
        step = 1 + self.points_per_object
        triples = [tokens[start : start + step] for start in range(0, self.max_objects * step, step)]
        objects = [(first, self.decode_points(rest)) for first, *rest in triples if first != self.none_token]
        return Layout(objects, self.decode_corners(*tokens[-2:]) if self.encode_crop else None)


class BoxTokenizer(LayoutTokenizer):
    """Encode an object as (class, upper left corner, lower right corner)."""

    points_per_object = 2

    def encode_box(self, box: Box) -> tuple[int, ...]:
        """Return the tokens of two opposite corners."""
        return self.encode_corners(box)

    def decode_points(self, tokens: Sequence[int]) -> tuple[float, ...]:
        """Return the box."""
        return self.decode_corners(*tokens)


class CentrePointTokenizer(LayoutTokenizer):
    """Encode an object as (class, centre)."""

    points_per_object = 1

    def encode_box(self, box: Box) -> tuple[int, ...]:
        """Return the token of the centre."""
        return (self.encode_point(box.left + box.width / 2, box.top + box.height / 2),)

    def decode_points(self, tokens: Sequence[int]) -> tuple[float, ...]:
        """Return the centre (x, y)."""
        return self.decode_point(*tokens)
