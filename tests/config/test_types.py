import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pytest

from ldm.bounds import Count, Fraction, Gt, Lt, Natural, NonNegative
from ldm.config.types import Made, fits, hints_of, mismatch


class Part:
    """Stand for what is built from a node."""


class Shape(Protocol):
    """Stand for what objects of any class may be."""


class Reader(Protocol):
    """Stand for what has a method."""

    def read(self) -> int: ...


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, int), (3, float), (True, bool), ("a", str), (None, int | None), ([1, 2], tuple[int, int]), ([], list[int]),
        ([1, 2.5], Sequence[float]), ("l1", Literal["l1", "l2"]), ("here", Path), ({"a": 1}, dict[str, int]),
        (Made(Part), Part), (Made(Part), Shape), (Made(Part), Part | None), (Part(), Shape), (Part(), Part),
        (len, Callable[[str], int]), ([1], int | Sequence[int]),
        ("anything", Any), (-1, int), (-1, int | None), (1, Count), (0, Natural), (None, Count | None),
        (0, NonNegative), ([1, 2], tuple[Count, ...]), (1, Fraction), (0.0, Fraction),
        (2, Annotated[int, Gt(1), Lt(3)]), (3, Annotated[int, "a word"]),
    ],
)  # fmt: skip
def test_what_fits(value: Any, annotation: Any) -> None:
    assert fits(value, annotation)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (True, int), (1, bool), (1.5, int), ("1e-4", float), (7, str), (None, int), ([1, 2, 3], tuple[int, int]),
        ("ab", Sequence[str]), (["a"], Sequence[int]), ("l3", Literal["l1", "l2"]), (7, Path), ([1], dict[str, int]),
        ("x", Shape), (None, Part), (object(), Part), (Made(Shape), Part), (Made(Part), int), (math.nan, float),
        ([Made(Shape)], list[Part]), (Made(Part), Reader), (Made(Part), Callable[[], int]),
        ({"a": 1}, Part), ("len", Callable[[str], int]), (0, Count),
        (-1, Natural | None), ([1, 0], tuple[Count, ...]), (-0.5, NonNegative),
        (1.5, Fraction), (-0.1, Fraction), (1, Annotated[int, Gt(1)]), (1, Annotated[float, Lt(1)]), (True, Count),
    ],
)  # fmt: skip
def test_what_does_not(value: Any, annotation: Any) -> None:
    assert not fits(value, annotation)


def test_messages_name_what_is_meant() -> None:
    assert mismatch("1e-4", float) == "'1e-4' is not a number (YAML reads 1e-4 as text; write 1.0e-4)"
    assert mismatch(["a"], tuple[int, str] | None).endswith("a list of 2 (a whole number, a text) or null")
    assert mismatch(-1, Count | None) == "-1 is not a whole number, 1 or more or null"
    assert mismatch(-0.5, NonNegative) == "-0.5 is not a number, 0 or more"
    assert mismatch(2, Fraction) == "2 is not a number, 0 or more, at most 1"
    assert mismatch(2, Annotated[int, Gt(2), Lt(5)]) == "2 is not a whole number, more than 2, less than 5"
    assert not mismatch(-1, int | None)  # ignore_index
    assert len(mismatch("x" * 500, int)) < 120


def test_annotations_that_cannot_be_read_ask_for_nothing() -> None:
    def function(value: "Unknown") -> None:  # noqa: F821
        del value

    assert hints_of(function) == {}
