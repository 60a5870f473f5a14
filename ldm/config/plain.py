"""From OmegaConf's containers to plain dicts and lists, interpolations resolved."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.errors import ConfigError


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


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]
