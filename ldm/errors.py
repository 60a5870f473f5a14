"""Exceptions for mistakes of the user; a leaf module that every layer may import."""

from collections.abc import Sequence

LONGEST = 300  # characters of a message


def shown(text: str, limit: int = 60) -> str:
    """Write text that a file brought so that it fits into a message: on one line, escaped, shortened in the middle."""
    written = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    if len(written) <= limit:
        return written
    tail = (limit - 3) // 2
    return f"{written[: limit - 3 - tail]}...{written[len(written) - tail :]}"


def some(names: Sequence[str], number: int = 3, separator: str = ", ", width: int | None = None) -> str:
    """Write the first few of some names, `shown` at a width if one is given, and how many more there are."""
    first = [name if width is None else shown(name, width) for name in names[:number]]
    return separator.join(first) + (f" and {len(names) - number} more" if names[number:] else "")


class UserError(Exception):
    """Report a mistake of the user in one line that names the place and the remedy.

    The command line prints the message without a traceback and exits with status 1. `whole` is the message before it
    was shortened.
    """

    def __init__(self, message: str) -> None:
        self.whole = message
        super().__init__(shown(" ".join(message.split()), LONGEST))


class ConfigError(UserError):
    """Report a mistake in a configuration as `FILE: dotted.path: problem`; file and path may be unknown (empty)."""

    def __init__(self, problem: str, path: str = "", source: str = "") -> None:
        self.problem, self.path, self.source = problem, path, source
        place = ": ".join(shown(part, LONGEST // 3) for part in (source, path) if part)
        short = shown(" ".join(problem.split()), LONGEST - len(place) - 2)
        super().__init__(f"{place}: {short}" if place else short)
        self.whole = f"{place}: {problem}" if place else problem
