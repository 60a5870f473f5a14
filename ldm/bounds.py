"""Bounds of numbers, stated where a parameter is declared: `channels: Count`, `weight: Annotated[float, Gt(0)]`.

A leaf module that every layer may import. Values from a config are held against them (see `ldm.config.types`); who
calls a constructor directly is not checked.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Ge:
    """At least `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        """Return whether a number is within the bound."""
        return value >= self.limit

    def __str__(self) -> str:
        return f"{self.limit} or more"


@dataclass(frozen=True)
class Gt:
    """More than `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        """Return whether a number is within the bound."""
        return value > self.limit

    def __str__(self) -> str:
        return f"more than {self.limit}"


@dataclass(frozen=True)
class Le:
    """At most `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        """Return whether a number is within the bound."""
        return value <= self.limit

    def __str__(self) -> str:
        return f"at most {self.limit}"


@dataclass(frozen=True)
class Lt:
    """Less than `limit`."""

    limit: float

    def allows(self, value: float) -> bool:
        """Return whether a number is within the bound."""
        return value < self.limit

    def __str__(self) -> str:
        return f"less than {self.limit}"


Bound = Ge | Gt | Le | Lt

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
