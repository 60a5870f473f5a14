from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from ldm.config.types import fits, hints_of, mismatch


class Part:
    """Stand for what is built from a node."""


class Shape(Protocol):
    """Stand for what objects of any class may be."""


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, int), (3, float), (True, bool), ("a", str), (None, int | None), ([1, 2], tuple[int, int]), ([], list[int]),
        ([1, 2.5], Sequence[float]), ("l1", Literal["l1", "l2"]), ("here", Path), ({"a": 1}, dict[str, int]),
        (Part(), Shape), (Part(), Part), (object(), Part), (len, Callable[[str], int]), ([1], int | Sequence[int]),
        ("anything", Any),
    ],
)  # fmt: skip
def test_what_fits(value: Any, annotation: Any) -> None:
    assert fits(value, annotation)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (True, int), (1, bool), (1.5, int), ("1e-4", float), (7, str), (None, int), ([1, 2, 3], tuple[int, int]),
        ("ab", Sequence[str]), (["a"], Sequence[int]), ("l3", Literal["l1", "l2"]), (7, Path), ([1], dict[str, int]),
        ("x", Shape), (None, Part), ({"a": 1}, Part), ("len", Callable[[str], int]), (-1, int), ([1, -2], list[int]),
    ],
)  # fmt: skip
def test_what_does_not(value: Any, annotation: Any) -> None:
    assert not fits(value, annotation)


def test_messages_name_what_is_meant() -> None:
    assert mismatch("1e-4", float) == "'1e-4' is not a number (YAML reads 1e-4 as text; write 1.0e-4)"
    assert mismatch(["a"], tuple[int, str] | None).endswith("a list of 2 (a whole number, 0 or more, a text) or null")
    assert mismatch(-0.5, float, "kl_weight") == "-0.5 is negative"
    assert not mismatch(-0.5, float, "logvar_init")
    assert len(mismatch("x" * 500, int)) < 120


def test_annotations_that_cannot_be_read_ask_for_nothing() -> None:
    def function(value: "Unknown") -> None:  # noqa: F821
        del value

    assert hints_of(function) == {}
