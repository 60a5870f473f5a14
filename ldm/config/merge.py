"""Lay one config over another."""

from collections.abc import Sequence
from typing import Any

from ldm.config.nodes import NODE_KEYS, REFERENCE_KEYS

_NAMES = ("target", *REFERENCE_KEYS)


def merge(below: Any, above: Any) -> Any:
    """Lay a value over another one: mappings are merged key by key, anything else takes the place of what was there.

    A node that names another `target` (or its config by another `base` or `run`) starts anew: it inherits none of the
    `params`, `checkpoint` and `ignore_keys` of the node below it, which were meant for the other target.
    """
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if _is_another_node(below, above):
        below = {key: value for key, value in below.items() if key not in (*NODE_KEYS, *REFERENCE_KEYS)}
    return below | {key: merge(below[key], value) if key in below else value for key, value in above.items()}


def _is_another_node(below: dict[str, Any], above: dict[str, Any]) -> bool:
    named, given = ({key: node[key] for key in _NAMES if key in node} for node in (below, above))
    return bool(named) and any(value != named.get(key) for key, value in given.items())


def set_value(config: Any, keys: Sequence[str], value: Any) -> Any:
    """Return a config in which `value` is merged into what stands under `keys`; positions of lists are digits.

    Raises TypeError for a way that leads through a number, LookupError and ValueError for absent positions of a list.
    """
    if not keys:
        return merge(config, value)
    key, rest = keys[0], keys[1:]
    if isinstance(config, list):
        index = range(len(config))[int(key)]
        return [*config[:index], set_value(config[index], rest, value), *config[index + 1 :]]
    if isinstance(config, (bool, int, float)):
        raise TypeError(f"{config!r} has no {key}")
    config = config if isinstance(config, dict) else {}  # a node may take the place of a text
    if key in REFERENCE_KEYS and not rest:
        return merge(config, {key: value})
    return config | {key: set_value(config.get(key), rest, value)}
