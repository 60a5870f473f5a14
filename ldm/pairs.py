"""NAME=VALUE pairs, as samplers, guidance and metrics take their options on a command line; a leaf module."""

from __future__ import annotations

from collections.abc import Iterable

from ldm.errors import UserError, shown


def pairs_of(words: Iterable[str], place: str) -> dict[str, str]:
    """Return the values by their names, as text. UserError, beginning with `place`, for a name that is given twice."""
    found: dict[str, str] = {}
    for name, _, value in (word.partition("=") for word in words if word):
        if name in found:
            raise UserError(f"{place}: {shown(name)} is given twice, as {shown(found[name])} and {shown(value)}")
        found[name] = value
    return found
