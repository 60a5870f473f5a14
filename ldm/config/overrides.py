"""Overrides of a config on the command line: `dotted.key=value`, the value as YAML has it."""

import re
from collections.abc import Sequence
from typing import Any

from ldm.config.merge import set_value
from ldm.config.plain import first_line
from ldm.config.text import parse
from ldm.errors import ConfigError

COMMAND_LINE = "command line"
_OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.[\w-]+|\[\d+\])+=")
_COMMENT = re.compile(r"""[^"'\[{]*\s#""")


def split_overrides(words: Sequence[str], flags: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Separate the overrides, `dotted.key=value`, from the other words of a command line.

    What follows one of these `flags`, whole or shortened, is its value: `--prompt a.b=3` asks for that text.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    before = ""
    for word in words:
        is_value = before in flags or (before[:2] == "--" != before and any(flag.startswith(before) for flag in flags))
        parts[is_value or not _OVERRIDE.match(word)].append(word)
        before = "" if is_value else word
    return parts


def parse_override(override: str) -> tuple[str, Any]:
    """Split an override into its key and its value. Raises ConfigError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is no override; write dotted.key=value", source=COMMAND_LINE)
    if _COMMENT.match(value):
        raise ConfigError("from # on it is a comment in YAML; quote the value, within other quotes", key, COMMAND_LINE)
    try:
        return key, parse(value)
    except ValueError as error:
        raise ConfigError(f"cannot be set: {error}", key, COMMAND_LINE) from error


def apply_overrides(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a config with `dotted.key=value` laid over it, left to right. Raises ConfigError.

    A mapping is merged into the one that is there. Positions of lists are written `parts.0` or `parts[0]`.
    """
    for override in overrides:
        key, value = parse_override(override)
        try:
            config = set_value(config, split_key(key), value)
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"cannot be set: {first_line(error)}", key, COMMAND_LINE) from error
    return config


def overridden_path(override: str) -> str:
    """Return the path that an override sets, list positions written as [0]."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", override.partition("=")[0])


def split_key(key: str) -> list[str]:
    """Split a path, `parts.0.size` or `parts[0].size`, into keys and positions."""
    return re.sub(r"\[(\d+)\]", r".\1", key).split(".")
