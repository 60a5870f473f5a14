"""The form of a config: what a node is, and how places in it are written (`model.params.parts[0].target`)."""

from collections.abc import Iterator
from typing import Any

SECTIONS = ("model", "training", "data", "lightning")
NODE_KEYS = ("target", "params", "checkpoint", "ignore_keys")
REFERENCE_KEYS = ("base", "run")


def is_node(value: Any) -> bool:
    """Return whether a value describes an object to be built."""
    return isinstance(value, dict) and "target" in value


def join(path: str, key: Any) -> str:
    """Return the path of what a mapping holds under a key, or a list at a position."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def children(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """List what a mapping or list holds, with paths; nothing for any other value."""
    if isinstance(value, dict):
        return [(join(path, str(key)), child) for key, child in value.items()]
    if isinstance(value, list):
        return [(join(path, index), child) for index, child in enumerate(value)]
    return []


def without_checkpoints(value: Any) -> Any:
    """Return a value in which no node starts from weights of a file."""
    if isinstance(value, list):
        return [without_checkpoints(child) for child in value]
    if not isinstance(value, dict):
        return value
    dropped = ("checkpoint", "ignore_keys") if is_node(value) else ()
    return {key: without_checkpoints(child) for key, child in value.items() if key not in dropped}


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a value and everything below it, with paths."""
    yield path, value
    for place, child in children(value, path):
        yield from walk(child, place)
