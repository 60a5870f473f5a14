"""Exceptions for mistakes of the user, and how messages show names; a leaf module that every layer may import."""

import difflib
import errno
import re
from collections.abc import Iterable, Sequence

LONGEST = 300  # characters of a message
# What the state of a machine refuses: places that are full, protected, of another kind, or broken.
_REFUSALS = {
    getattr(errno, name, 0)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "EEXIST",
                 "EFBIG", "EMFILE", "ENFILE", "ELOOP")
} - {0}  # fmt: skip
_ASKED_FOR = re.compile(r"allocate ([\d.]+ ?\w+)")  # in what torch, CUDA and numpy say


def shown(text: str, limit: int = 60) -> str:
    """Write text that a file brought so that it fits into a message: on one line, escaped, shortened in the middle."""
    if len(text) > 2 * limit:  # what is written is not shorter than what it stands for
        text = text[:limit] + text[-limit:]
    written = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    if len(written) <= limit:
        return written
    tail = (limit - 3) // 2
    return f"{written[: limit - 3 - tail]}...{written[len(written) - tail :]}"


def writable(text: str) -> str:
    """Return a text with the halves of characters in it, which no encoding has, written as escapes (`\\udce9`)."""
    return text.encode("utf-8", "backslashreplace").decode()


def some(names: Sequence[str], number: int = 3, separator: str = ", ", width: int | None = None) -> str:
    """Write the first few of some names, `shown` at a width if one is given, and how many more there are."""
    first = [name if width is None else shown(name, width) for name in names[:number]]
    return separator.join(first) + (f" and {len(names) - number} more" if names[number:] else "")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Phrase a guess at what was meant: `; did you mean NAME?`, or nothing when no name is close."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6) if len(name) <= 100 else []
    matches.sort(key=lambda match: sorted(match) != sorted(name.lower()))  # swapped letters are likelier than others
    return f"; did you mean {by_lower[matches[0]]}?" if matches else ""


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


def lack_of_memory(error: BaseException) -> str:
    """Return one line on an error that is a lack of memory, of a device or of the machine; nothing for any other."""
    is_lack = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the latter is torch's
    if not is_lack and "allocate memory" not in str(error):
        return ""
    asked = _ASKED_FOR.search(str(error))
    room = f"no room for {asked[1]} more" if asked else "there is no more"
    return f"out of memory: {room}; smaller batches, smaller images or half precision need less"


def refused_by_the_system(error: BaseException) -> str:
    """Return one line on a file that could not be written or read for what the machine says; nothing for any other."""
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return ""
    return shown(f"{error.filename or 'a file'}: {error.strerror}; choose another place, or make room", LONGEST)
