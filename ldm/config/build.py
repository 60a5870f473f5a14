"""From nodes to objects: children first, so that no constructor ever sees a config; then weights are filled in."""

import traceback
from collections.abc import Mapping
from typing import Any

from ldm.config.check import check_checkpoints, check_value, validate
from ldm.config.nodes import children, is_node, join
from ldm.config.parameters import given_later, parameters_of
from ldm.config.plain import plain
from ldm.config.targets import find_target
from ldm.config.trust import is_theirs
from ldm.errors import ConfigError, UserError, lack_of_memory

_IN_A_CONSTRUCTOR = 2  # frames of the traceback of a TypeError: this module's, and one that calls a parent's


def instantiate(node: Any, path: str = "", kind: Any = None, **extra: Any) -> Any:
    """Build the object that a node describes, its children first; `extra` are further parameters of the outermost.

    `kind` is the class of what the outermost has to make, where it is known.

    Mappings and lists without a target are returned with their nodes built. Weights named by `checkpoint` are read
    unless modules are made on the meta device, which has nowhere to put them. A node of an optimiser becomes what makes
    it when it is called with parameters and learning rate. Raises ConfigError before building for
    what `validate` finds and for absent checkpoints; a UserError of a constructor gets the path of its node in front.
    """
    from ldm.config import meta_device  # imports torch

    node = plain(node)
    validate(node, path, tuple(extra), kind)
    if not meta_device.is_asked_for():
        check_checkpoints(node, path)
    with meta_device.without_values():
        return _build(node, path, extra)


def _build(node: Any, path: str, extra: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(child, place, {}) for place, child in children(node, path)]
    if not isinstance(node, dict):
        return node
    if not is_node(node):
        return {key: _build(value, join(path, str(key)), {}) for key, value in node.items()}
    params = _build(node.get("params") or {}, join(path, "params"), {})
    if given_later(find_target(node["target"], path)):
        return lambda **given: _call(node["target"], path, {**params, **given})
    built = _call(node["target"], path, {**params, **extra})
    if node.get("checkpoint"):
        _fill(built, node, path)
    return built


def _call(target: str, path: str, params: dict[str, Any]) -> Any:
    """Call a target; whatever goes wrong inside names the node of the YAML that asked for it."""
    function = find_target(target, path)
    expected = parameters_of(function)
    for name, value in params.items():
        check_value(value, expected.hint(name), join(join(path, "params"), name))
    try:
        return function(**params)
    except ConfigError:
        raise
    except UserError as error:
        raise ConfigError(str(error), path) from error
    except Exception as error:
        if problem := _of_the_user(error, target):
            raise ConfigError(f"{target}: {problem}", path) from error
        error.add_note(f"while building {path or 'the config'}: {target}")
        raise


def _of_the_user(error: Exception, target: str) -> str:
    """Return what an exception says of the parameters of a constructor or of their sizes, nothing for any other."""
    if is_theirs(target):
        return str(error) or type(error).__name__
    depth = len(traceback.extract_tb(error.__traceback__))
    if isinstance(error, TypeError) and depth <= _IN_A_CONSTRUCTOR and "argument" in str(error):
        return str(error)
    if lack_of_memory(error):
        return "needs more memory than there is; make it smaller"
    return ""


def _fill(built: Any, node: dict[str, Any], path: str) -> None:
    from torch import nn

    from ldm.config import meta_device
    from ldm.weights.load import load_into

    if meta_device.is_asked_for():
        return
    place = join(path, "checkpoint")
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{node['target']} makes a {type(built).__name__}, which holds no weights", place)
    try:
        load_into(built, node["checkpoint"], ignore=node.get("ignore_keys") or (), widen=True)
    except UserError as error:
        raise ConfigError(str(error), place) from error
