"""From OmegaConf's containers to plain dicts and lists, interpolations resolved."""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.allowance import VARIABLES, add, allowed
from ldm.config.nodes import join, walk
from ldm.config.text import DEEPEST, LARGEST
from ldm.errors import ConfigError, shown

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_BEGIN = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # of one that is not escaped
_VARIABLE = re.compile(r"\s*oc\.env\s*:\s*([^\s,]+)\s*(?:,.*)?")
_ABSENT = object()
_PLAIN = (dict, list, str, int, float, bool, type(None))


def plain(node: Any, throw_on_missing: bool = True) -> Any:
    """Turn OmegaConf containers, wherever they are, into dicts and lists, with interpolations resolved.

    Raises ConfigError for an interpolation that leads nowhere and, unless told otherwise, for a value `???`.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        try:
            return OmegaConf.to_container(node, resolve=True, throw_on_missing=throw_on_missing)
        except OmegaConfBaseException as error:
            hint = "; write \\${ where no reference is meant" if "nterpolation" in str(error) else ""
            raise ConfigError(first_line(error) + hint, str(getattr(error, "full_key", "") or "")) from error
    if isinstance(node, Mapping):
        return {key: plain(value, throw_on_missing) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value, throw_on_missing) for value in node]
    return node


def resolve(config: dict[str, Any], throw_on_missing: bool = True) -> dict[str, Any]:
    """Return a plain config with its interpolations resolved: `${key.of.another}` and `${oc.env:NAME}`.

    Raises ConfigError as `plain` does, and for interpolations that would expand without bound.
    """
    if all(map(_is_settled, (value for _, value in walk(config)))):
        return deepcopy(config)
    try:
        _Expansion(config).check()
        return plain(OmegaConf.create(config), throw_on_missing)
    except RecursionError:
        raise ConfigError("its interpolations refer to each other too often") from None


def allow_variables(text: str) -> None:
    """Allow the variables of the environment that a text of one's own reads."""
    for name in _REFERENCE.findall(text):
        if variable := _VARIABLE.fullmatch(name):
            add(f"{VARIABLES}{variable[1]}")


def _is_settled(value: Any) -> bool:
    """Return whether a value is plain, and no text that stands for another or for a missing value."""
    return type(value) in _PLAIN and not (type(value) is str and ("${" in value or value == "???"))


class _Expansion:
    """Measures a config with its interpolations resolved, without resolving any: characters, and steps to a value."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.known: dict[str, tuple[int, int]] = {}

    def check(self) -> None:
        """Raise ConfigError for more than `LARGEST`, and for interpolations that cannot be counted."""
        self._measured(self.config, ())

    def _measured(self, value: Any, place: tuple[Any, ...]) -> tuple[int, int]:
        """Return size and depth of a value at a place; one that is under way, in a circle, is left to OmegaConf."""
        path = ""
        for key in place:
            path = join(path, key)
        if path not in self.known:
            self.known[path] = 0, 0
            parts = [(1, 0), *self._parts(value, place, path)]
            size, depth = sum(size for size, _ in parts), max(depth for _, depth in parts) + isinstance(value, str)
            if size > LARGEST or depth > DEEPEST:
                limit = f"{LARGEST:,} characters" if size > LARGEST else f"{DEEPEST} steps"
                raise ConfigError(f"its interpolations lead to more than {limit}", path)
            self.known[path] = size, depth
        return self.known[path]

    def _parts(self, value: Any, place: tuple[Any, ...], path: str) -> Iterator[tuple[int, int]]:
        if isinstance(value, dict | list):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                yield self._measured(child, (*place, key))
        elif isinstance(value, str):
            yield len(value), 0
            for begin in _BEGIN.finditer(value):
                found = _REFERENCE.match(value, begin.end() - 2)
                if found is None:
                    raise ConfigError("has an interpolation that is not closed, or one within another", path)
                yield self._of_reference(found[1], place[:-1], path)

    def _of_reference(self, name: str, parent: tuple[Any, ...], path: str) -> tuple[int, int]:
        if ":" in name:
            if (variable := _VARIABLE.fullmatch(name)) is None:
                raise ConfigError(f"{shown(name)} is unknown in an interpolation; use a key, or oc.env:NAME", path)
            if f"{VARIABLES}{variable[1]}" not in allowed():
                hint = f"the config may be a stranger's; if you trust it, give --allow {VARIABLES}{shown(variable[1])}"
                raise ConfigError(f"reads {shown(variable[1])} of the environment, and {hint}", path)
            return 0, 0
        dots = len(name) - len(name.lstrip("."))
        base = parent[: len(parent) - dots + 1] if dots else ()
        found, place = self.config, ()
        for key in (*base, *re.findall(r"[^.\[\]]+", name)):
            if isinstance(found, str):  # the way leads through another interpolation: count all of what that is
                break
            key = int(key) if isinstance(found, list) and str(key).isdecimal() else key
            try:
                found, place = found[key], (*place, key)
            except (LookupError, TypeError):
                return 0, 0  # OmegaConf will say so
        return self._measured(found, place)


def with_references(config: Mapping[str, Any], written: Mapping[str, Any], section: str = "data") -> dict[str, Any]:
    """Return a resolved config in which values of a section are references to each other again, as they were `written`.

    So that another value for one, such as the place of moved data, is one for all. A reference that would now lead to
    another value, or nowhere, stays the value. Both configs are plain. A resolved text that looks like a reference is
    written as none.
    """
    config = _escaped(config)
    values = walk(written.get(section), section)
    references = [(path, value) for path, value in values if _refers_within(value, section)]
    if not references:
        return dict(config)
    kept = OmegaConf.create(dict(config))
    for path, text in references:
        value = OmegaConf.select(kept, path, default=_ABSENT)
        if value is _ABSENT:
            continue
        OmegaConf.update(kept, path, text)
        try:
            is_same = OmegaConf.select(kept, path, throw_on_missing=True) == value
        except OmegaConfBaseException:
            is_same = False
        if not is_same:
            OmegaConf.update(kept, path, _escaped(value))
    return OmegaConf.to_container(kept)


def _escaped(value: Any) -> Any:
    """Return a resolved value as it has to be written to be read as it is."""
    if isinstance(value, Mapping):
        return {key: _escaped(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_escaped(child) for child in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _refers_within(value: Any, section: str) -> bool:
    names = _REFERENCE.findall(value) if isinstance(value, str) else []
    return bool(names) and all(name.startswith(f"{section}.") for name in names)


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]
