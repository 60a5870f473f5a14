"""YAML text -> plain values: what would crash the parser, fill memory or take minutes is refused before it does."""

import codecs
import hashlib
import io
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.nodes import walk

SEAL = "# SHA-256 of the lines below: "
LARGEST = 1_000_000  # bytes of a file, and characters of a config whose interpolations are resolved
MOST = 10_000  # values, the limit of OmegaConf
DEEPEST = 50  # mappings and lists within each other
_TOO_DEEP = f"is nested more than {DEEPEST} deep"
_INTEGERS = range(-(2**63), 2**64)
_OF_TAGS = (ValueError, LookupError, TypeError, AttributeError, OSError)  # what values under a wrong tag raise
_STARTS, _ENDS = (yaml.CollectionStartEvent, yaml.CollectionEndEvent)


class Damaged(ValueError):
    """A file is not as a program wrote it."""


def sealed(text: str) -> str:
    """Return text below a line by which `read` finds out whether it was damaged, or edited, since."""
    return f"{SEAL}{_digest(text)}\n{text}"


def parse(text: str) -> Any:
    """Return what YAML text says; interpolations stay as they are. ValueError: one line on what is wrong with it."""
    return deepcopy(_parsed(text))


@lru_cache(maxsize=100)  # a start reads each of its files several times: as a base, and to find out whose code it names
def _parsed(text: str) -> Any:
    try:
        if _is_plain(text):
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        else:
            value = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))  # which counts what aliases stand for
        _check_values(value)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (yaml.YAMLError, OmegaConfBaseException, *_OF_TAGS) as error:
        is_long = "for integer string conversion" in str(error)  # Python then advises to lift its limit
        raise ValueError("a whole number of thousands of digits" if is_long else str(error)) from error
    return value


def read(path: Path) -> Any:
    """Return what a YAML file says. Raises OSError, Damaged for a broken seal, and ValueError as `parse` does."""
    if path.exists() and not path.is_file():
        raise OSError("is no file")  # opening a pipe would wait for somebody to write
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"holds more than {LARGEST:,} bytes, which is no config")
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if is_wide else "utf-8-sig").replace("\r\n", "\n")
    first, _, rest = text.partition("\n")
    if first.startswith(SEAL) and first.removeprefix(SEAL) != _digest(rest):
        raise Damaged("is not as it was written; restore it, or, if you edited it, remove its first line")
    return parse(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_plain(text: str) -> bool:
    """Return whether a text holds neither mapping nor list. ValueError where these are nested too deep.

    Nothing is built: the builders recurse, in C as well.
    """
    depth, is_plain = 0, True
    for number, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        depth += isinstance(event, _STARTS) - isinstance(event, _ENDS)
        is_plain = is_plain and depth == 0
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)
        if number > 2 * MOST:
            raise ValueError(f"holds more than {MOST:,} values, which is no config")
    return is_plain


def _check_values(content: Any) -> None:
    for place, value in walk(content):
        if isinstance(value, int) and value not in _INTEGERS:
            raise ValueError(f"{place}: a whole number of {value.bit_length()} bits; at most 64 are read".lstrip(": "))
        if isinstance(value, bytes):
            raise ValueError(f"{place}: binary data, which no config has".lstrip(": "))
