"""Folders of diffusers with one value of one JSON file changed to what nobody means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, 0.5, float("nan"), float("inf"), "", "x" * 10_000, [], [[]], [0], [None], ["a"] * 40,
    [10**9] * 4, {}, {"a": {}},
)  # fmt: skip


class Mutation(NamedTuple):
    """One value of one file, by its field."""

    file: str
    field: str
    value: Any


def mutations(folder: Path) -> Iterator[Mutation]:
    """Yield every field of every JSON file of a folder with every hostile value."""
    for path in sorted(folder.rglob("*.json")):
        for field in json.loads(path.read_text()):
            for value in HOSTILE:
                yield Mutation(str(path.relative_to(folder)), field, value)
