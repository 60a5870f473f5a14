"""From OmegaConf's containers to plain dicts and lists, interpolations resolved."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.config.nodes import walk
from ldm.errors import ConfigError

_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_ABSENT = object()


def plain(node: Any, throw_on_missing: bool = True) -> Any:
    """Turn OmegaConf containers, wherever they are, into dicts and lists, with interpolations resolved.

    Raises ConfigError for an interpolation that leads nowhere and, unless told otherwise, for a value `???`.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        try:
            return OmegaConf.to_container(node, resolve=True, throw_on_missing=throw_on_missing)
        except OmegaConfBaseException as error:
            raise ConfigError(first_line(error), str(getattr(error, "full_key", "") or "")) from error
    if isinstance(node, Mapping):
        return {key: plain(value, throw_on_missing) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value, throw_on_missing) for value in node]
    return node


def resolve(config: dict[str, Any], throw_on_missing: bool = True) -> dict[str, Any]:
    """Return a plain config with its interpolations resolved. Raises ConfigError as `plain` does."""
    return plain(OmegaConf.create(config), throw_on_missing)


def with_references(config: Mapping[str, Any], written: Mapping[str, Any], section: str = "data") -> DictConfig:
    """Return a resolved config in which values of a section are references to each other again, as they were `written`.

    So that another value for one, such as the place of moved data, is one for all. A reference that would now lead to
    another value, or nowhere, stays the value.
    """
    kept = OmegaConf.create(dict(config))
    for path, text in walk(OmegaConf.to_container(OmegaConf.create(dict(written))).get(section), section):
        names = _REFERENCE.findall(text) if isinstance(text, str) else []
        if not names or not all(name.startswith(f"{section}.") for name in names):
            continue
        value = OmegaConf.select(kept, path, default=_ABSENT)
        if value is _ABSENT:
            continue
        OmegaConf.update(kept, path, text)
        try:
            is_same = OmegaConf.select(kept, path, throw_on_missing=True) == value
        except OmegaConfBaseException:
            is_same = False
        if not is_same:
            OmegaConf.update(kept, path, value)
    return kept


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]
