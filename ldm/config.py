"""YAML to objects: load, merge, override, check, build.

A node is `{target: import.path, params: {...}}`, and may carry `checkpoint: PATH` with `ignore_keys: [PREFIX, ...]` to
fill the module with weights once it is built. Nodes nest anywhere inside `params`, also in lists; children are built
first, so that no constructor ever sees a config. Whatever is wrong is reported before anything is built, as

    FILE: model.params.network.params.num_head: unknown; did you mean num_heads?
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm import compat
from ldm.errors import ConfigError, UserError
from ldm.targets import find_target, missing_parameters, nearest, parameters_of
from ldm.value_types import mismatch

__all__ = ["ConfigError", "instantiate", "load", "validate"]

COMMAND_LINE = "command line"
SECTIONS = ("model", "data", "lightning")
NODE_KEYS = ("target", "params", "checkpoint", "ignore_keys")
OUTERMOST_KEYS = NODE_KEYS + ("base_learning_rate", "learning_rate", "global_batch", "allow_untrained_first_stage")


def load(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), check: bool = True) -> DictConfig:
    """Read YAML files, merge them left to right, apply `dotted.key=value` overrides, translate the CompVis dialect.

    The sections `model` and `data` are validated unless `check` is false. Raises ConfigError, naming the file (or the
    command line) that holds the mistake.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    merged, origins = OmegaConf.create({}), []
    for path in map(Path, paths):
        content = _read(path)
        merged = _merge(merged, content, str(path))
        origins.append((str(path), _paths(content)))
    origins.append((COMMAND_LINE, {_override(merged, override) for override in overrides}))
    try:
        config = compat.translate(_plain(merged))
        if check:
            _check_sections(config)
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, _origin(error.path, origins)) from error.__cause__
    return OmegaConf.create(config)


def validate(node: Any, path: str = "", provided: Iterable[str] = ()) -> None:
    """Check every node of a config without building anything: targets, parameter names, required parameters.

    `provided` names the parameters of the outermost node that the caller will supply. Raises ConfigError.
    """
    _check(compat.translate_node(_plain(node), path), path, tuple(provided))


def instantiate(node: Any, path: str = "", **extra: Any) -> Any:
    """Build the object that a node describes, its children first; `extra` are further parameters of the outermost.

    Mappings and lists without a target are returned with their nodes built. Weights named by `checkpoint` are read
    unless modules are made on the meta device, which has nowhere to put them. Raises ConfigError before building for
    what `validate` finds and for absent checkpoints; a UserError of a constructor gets the path of its node in front.
    """
    node = compat.translate_node(_plain(node), path)
    _check(node, path, tuple(extra))
    if not _on_meta_device():
        _check_checkpoints(node, path)
    return _build(node, path, extra)


# ------------------------------------------------------------------------------------------------ reading and merging


def _read(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        similar = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"no such file{nearest(path.name, similar)}", source=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", source=str(path)) from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"is not valid YAML: {' '.join(str(error).split())}", source=str(path)) from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"must hold a mapping with the keys {', '.join(SECTIONS)}", source=str(path))
    return content


def _merge(config: DictConfig, content: DictConfig, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, content)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot be merged: {_first_line(error)}", _key(error), source) from error


def _override(config: DictConfig, override: str) -> str:
    """Apply one `dotted.key=value` to the config; return the key, list positions written as [0]."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is no override; write dotted.key=value", source=COMMAND_LINE)
    try:
        _refuse_to_go_into_a_value(config, key)
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"])["value"], merge=True)
    except (yaml.YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot be set: {_first_line(error)}", key, COMMAND_LINE) from error
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)


def _refuse_to_go_into_a_value(config: DictConfig, key: str) -> None:
    """Raise TypeError if a key leads through a number; through a string it may, to put a node in its place."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        value = OmegaConf.select(config, ".".join(parts[:length]))
        if isinstance(value, (bool, int, float)):
            raise TypeError(f"{'.'.join(parts[:length])} is {value!r}, which has no {parts[length]}")


def _plain(node: Any) -> Any:
    """Turn OmegaConf containers, wherever they are, into dicts and lists, with interpolations resolved."""
    if isinstance(node, (DictConfig, ListConfig)):
        try:
            return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(_first_line(error), _key(error)) from error
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    return node


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _key(error: BaseException) -> str:
    return str(getattr(error, "full_key", "") or "")


def _origin(path: str, origins: list[tuple[str, set[str]]]) -> str:
    """Name the last source that holds the path or, if none does (something is missing there), its closest parent."""
    while path:
        inside = (f"{path}.", f"{path}[")
        holders = [name for name, held in origins if path in held]
        holders = holders or [name for name, held in origins if any(key.startswith(inside) for key in held)]
        if holders:
            return holders[-1]
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return ", ".join(name for name, _ in origins if name != COMMAND_LINE)


def _paths(content: DictConfig) -> set[str]:
    return {path for path, _ in _walk(OmegaConf.to_container(content, resolve=False), "")}


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every value below a node with its dotted path, the node itself first."""
    yield path, node
    for place, child in _children(node, path):
        yield from _walk(child, place)


def _children(node: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [(_join(path, key), value) for key, value in node.items()]
    if isinstance(node, list):
        return [(f"{path}[{index}]", value) for index, value in enumerate(node)]
    return []


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


# --------------------------------------------------------------------------------------------------------- validation


def _check_sections(config: dict[str, Any]) -> None:
    for key in config:
        if key not in SECTIONS:
            raise ConfigError(f"unknown{nearest(str(key), SECTIONS) or '; sections are ' + ', '.join(SECTIONS)}", key)
    for section in ("model", "data"):
        if section in config and not (isinstance(config[section], dict) and "target" in config[section]):
            raise ConfigError("needs a target", section)
        _check(config.get(section), section)


def _check(node: Any, path: str, provided: Sequence[str] = (), keys: Sequence[str] = OUTERMOST_KEYS) -> None:
    place = path
    if _is_node(node):
        _check_node(node, path, provided, keys)
        node, place = node.get("params"), _join(path, "params")
    elif isinstance(node, dict):
        _check_that_it_is_no_node(node, path)
    for child_place, child in _children(node, place):
        _check(child, child_place, keys=NODE_KEYS)


def _check_that_it_is_no_node(mapping: dict[str, Any], path: str) -> None:
    """Raise ConfigError for a mapping that was meant to be a node: a misspelt target, or params without any."""
    for key, value in mapping.items():
        if isinstance(value, str) and "." in value and nearest(str(key), ("target",)):
            raise ConfigError("unknown; did you mean target?", _join(path, key))
    if isinstance(mapping.get("params"), dict):
        raise ConfigError("needs a target", path)


def _check_node(node: dict[str, Any], path: str, provided: Sequence[str], keys: Sequence[str]) -> None:
    for key in node:
        if key not in keys:
            hint = nearest(str(key), keys) or f"; a node has {', '.join(keys)}"
            raise ConfigError(f"unknown{hint}", _join(path, key))
    target = node["target"]
    expected = parameters_of(find_target(target, path))
    params = node.get("params") or {}
    place = _join(path, "params")
    if not isinstance(params, dict):
        raise ConfigError("must map parameter names to values", place)
    for name, value in params.items():
        if not any(_is_node(part) for _, part in _walk(value, "")):  # what nodes make is checked when it is made
            _check_value(value, expected.hints.get(name), _join(place, name))
        if name not in expected.names and not expected.open_ended:
            hint = nearest(str(name), expected.names) or f"; {target} takes {', '.join(expected.names) or 'nothing'}"
            raise ConfigError(f"unknown{hint}", _join(place, name))
    absent = [name for name in expected.required if name not in params and name not in provided]
    if absent:
        raise missing_parameters(absent, target, place)
    for key, kind in (("checkpoint", str | None), ("ignore_keys", list[str] | None)):
        _check_value(node.get(key), kind, _join(path, key))
    if node.get("ignore_keys") and not node.get("checkpoint"):
        raise ConfigError("has no effect without checkpoint", _join(path, "ignore_keys"))


def _check_value(value: Any, annotation: Any, place: str) -> None:
    name = place.rpartition(".")[2]
    if annotation is not None and (problem := mismatch(value, annotation, name)):
        raise ConfigError(problem, place)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "target" in value


def _check_checkpoints(node: Any, path: str) -> None:
    from ldm.weights.load import locate

    for place, value in _walk(node, path):
        if isinstance(value, dict) and "target" in value and value.get("checkpoint"):
            try:
                locate(value["checkpoint"])
            except UserError as error:
                raise ConfigError(str(error), _join(place, "checkpoint")) from error


# ----------------------------------------------------------------------------------------------------------- building


def _build(node: Any, path: str, extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(child, place, {}) for place, child in _children(node, path)]
    if not isinstance(node, dict):
        return node
    if "target" not in node:
        return {key: _build(value, _join(path, key), {}) for key, value in node.items()}
    params = _build(node.get("params") or {}, _join(path, "params"), {})
    built = _call(node["target"], path, {**params, **extra})
    if node.get("checkpoint") and not _on_meta_device():
        _fill(built, node, path)
    return built


def _call(target: str, path: str, params: dict[str, Any]) -> Any:
    """Call a target; whatever goes wrong inside says which node of the YAML asked for it."""
    function = find_target(target, path)
    hints = parameters_of(function).hints
    for name, value in params.items():
        _check_value(value, hints.get(name), _join(_join(path, "params"), name))
    try:
        return function(**params)
    except ConfigError:
        raise
    except UserError as error:
        raise ConfigError(str(error), path) from error
    except Exception as error:
        error.add_note(f"while building {path or 'the config'}: {target}")
        raise


def _fill(built: Any, node: dict[str, Any], path: str) -> None:
    from torch import nn

    from ldm.weights.load import load_into

    place = _join(path, "checkpoint")
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{node['target']} makes a {type(built).__name__}, which holds no weights", place)
    try:
        load_into(built, node["checkpoint"], ignore=node.get("ignore_keys") or ())
    except UserError as error:
        raise ConfigError(str(error), place) from error


def _on_meta_device() -> bool:
    import torch

    return torch.get_default_device().type == "meta"
