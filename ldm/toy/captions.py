"""The language of the generated scenes: one grammar, written by `Description.caption` and read back by `parse`.

    caption  = thing
             | thing relation thing
             | thing relation thing ", and" thing side
    thing    = article [size] colour shape
    relation = "to the left of" | "to the right of" | "above" | "below"
    side     = "on the left" | "on the right" | "above" | "below"      (of both other things)

The third thing stands on the axis that the first two do not use. Image coordinates: x to the right, y downwards.

Held-out captions: a pair of things and where they stand, whichever of the two is named first and whatever sizes are
mentioned, is either always or never in the training split; a stable hash decides.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from ldm.errors import UserError

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SIZES = ("small", "large")
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
SIDES = {"left": "on the left", "right": "on the right", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
HELD_OUT_PERCENT = 25

_THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_THING}(?: ({'|'.join(RELATIONS.values())}) {_THING}(?:, and {_THING} ({'|'.join(SIDES.values())}))?)?"
)


@dataclass(frozen=True)
class Thing:
    """One coloured shape; `size` None means that the caption does not mention it."""

    shape: str
    colour: str
    size: str | None = None

    def phrase(self) -> str:
        """Return the noun phrase, such as "a small red circle"."""
        words = [word for word in (self.size, self.colour, self.shape) if word]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


@dataclass(frozen=True)
class Description:
    """What a caption says: one to three things, where the first stands to the second, and the side of the third."""

    things: tuple[Thing, ...]
    relation: str | None = None
    side: str | None = None

    def caption(self) -> str:
        """Return the sentence that `parse` reads back."""
        text = self.things[0].phrase()
        if len(self.things) > 1:
            text += f" {RELATIONS[self.relation]} {self.things[1].phrase()}"
        if len(self.things) > 2:
            text += f", and {self.things[2].phrase()} {SIDES[self.side]}"
        return text

    def pair(self) -> str | None:
        """Return one canonical text for the first two things, without sizes; None for a single thing."""
        if len(self.things) < 2:
            return None
        first, second = self.things[:2]
        relation = self.relation
        if relation in ("right", "below"):
            first, second, relation = second, first, OPPOSITE[relation]
        return f"{first.colour} {first.shape} {relation} {second.colour} {second.shape}"


def parse(caption: str) -> Description:
    """Read a caption of this grammar.

    Raises UserError when the sentence is not of the grammar.
    """
    match = _CAPTION.fullmatch(caption.strip().lower().rstrip("."))
    if match is None:
        example = "a red circle to the left of a blue square"
        raise UserError(f"caption {caption!r}: not understood; write it like {example!r}")
    parts = match.groups()
    things = [Thing(shape, colour, size) for size, colour, shape in (parts[0:3], parts[4:7], parts[7:10]) if shape]
    relation = next((key for key, words in RELATIONS.items() if words == parts[3]), None)
    side = next((key for key, words in SIDES.items() if words == parts[10]), None)
    return Description(tuple(things), relation, side)


def is_held_out(description: Description) -> bool:
    """Return whether the first two things in this arrangement are kept out of the training split."""
    pair = description.pair()
    return pair is not None and zlib.crc32(pair.encode()) % 100 < HELD_OUT_PERCENT


def held_out(caption: str) -> bool:
    """Return whether the training split never shows this caption."""
    return is_held_out(parse(caption))


def two_object_descriptions() -> Iterator[Description]:
    """Yield every two-object description without sizes, in a fixed order."""
    things = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
    for first, second in permutations(things, 2):
        for relation in RELATIONS:
            yield Description((first, second), relation)


def held_out_captions(num_captions: int, seed: int = 0) -> list[str]:
    """Choose distinct two-object captions that the training split never shows.

    Raises UserError when there are fewer than `num_captions`.
    """
    captions = [item.caption() for item in two_object_descriptions() if is_held_out(item)]
    if not 0 <= num_captions <= len(captions):
        raise UserError(f"held_out_captions: num_captions {num_captions} is not in 0..{len(captions)}")
    order = np.random.default_rng(seed).permutation(len(captions))
    return [captions[i] for i in order[:num_captions]]
