"""Names chosen by patterns: `*`, `?` and `[abc]` as in file names, where `*` also spans dots."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from ldm.errors import UserError, did_you_mean, shown, some


def matched(patterns: Iterable[str], names: Iterable[str], key: str, what: str) -> dict[str, str]:
    """Return the names that a pattern matches, each with the last pattern that does.

    UserError for a pattern that matches none, with the nearest that would: `key` is what holds the patterns, `what` the
    things that have these names.
    """
    names, found = list(names), {}
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            hint = did_you_mean(pattern, _patterns_for(names)) or f"; there are {some(names, 2, width=70) or 'none'}"
            raise UserError(f"{key}: {shown(repr(pattern), 70)} matches no {what}{hint}")
        found |= dict.fromkeys(hits, pattern)
    return {name: found[name] for name in names if name in found}


def _patterns_for(names: Iterable[str]) -> list[str]:
    """List patterns that people write for names: themselves, what begins as they do, what has a part of theirs."""
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        heads = [".".join(parts[:length]) for length in range(1, len(parts))]
        patterns |= dict.fromkeys([f"{head}.*" for head in heads] + [f"*.{part}.*" for part in parts[1:-1]])
        patterns |= dict.fromkeys([f"*.{parts[-1]}", name])
    return list(patterns)
