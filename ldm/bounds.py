"""Bounds of numbers, stated where a parameter is declared: `channels: Count`, `weight: Annotated[float, Gt(0)]`.

A leaf module that every layer may import. Values from a config are held against them (see `ldm.config.types`); who
calls a constructor directly is not checked.
"""

import operator
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Annotated, ClassVar


@dataclass(frozen=True)
class Bound:
    """A limit of a number; a subclass says on which side of it the number is."""

    limit: float
    words: ClassVar[str]
    compare: ClassVar[Callable[[float, float], bool]]

    def allows(self, value: float) -> bool:
        """Return whether a number is within the bound."""
        return self.compare(value, self.limit)

    def __str__(self) -> str:
        return self.words.format(self.limit)


class Ge(Bound):
    """At least `limit`."""

    words, compare = "{} or more", staticmethod(operator.ge)


class Gt(Bound):
    """More than `limit`."""

    words, compare = "more than {}", staticmethod(operator.gt)


class Le(Bound):
    """At most `limit`."""

    words, compare = "at most {}", staticmethod(operator.le)


class Lt(Bound):
    """Less than `limit`."""

    words, compare = "less than {}", staticmethod(operator.lt)


class Most(Bound):
    """A list of at most `limit`."""

    words = "of at most {}"

    def allows(self, value: Sized) -> bool:
        """Return whether a list is short enough."""
        return len(value) <= self.limit


Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
# What a network is made of: more than this is a slip, and would take minutes to build or not fit into any memory.
Size = Annotated[int, Ge(1), Le(1_000_000)]
Sides = Size | tuple[Size, Size]  # of a square, or (height, width)
Depth = Annotated[int, Ge(0), Le(200)]
Levels = Annotated[Sequence[Size], Most(16)]
