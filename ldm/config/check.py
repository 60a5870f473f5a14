"""What can be checked before anything is built: targets, names and values of parameters, absent checkpoints."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ldm.config.nodes import NODE_KEYS, SECTIONS, children, is_node, join, walk
from ldm.config.parameters import Parameters, given_later, parameters_of
from ldm.config.plain import plain
from ldm.config.targets import did_you_mean, find_target, is_slip, missing_parameters
from ldm.config.trust import made_by, may_hold
from ldm.config.types import Made, fits, mismatch
from ldm.errors import ConfigError, UserError

TRAINING_KEYS = (*NODE_KEYS, "base_learning_rate", "learning_rate", "global_batch", "allow_untrained_first_stage")


def validate(node: Any, path: str = "", provided: Iterable[str] = (), kind: Any = None) -> None:
    """Check every node of a config without building anything: targets, parameter names and values.

    `provided` names the parameters of the outermost node that the caller will supply, `kind` the class of what it has
    to make. Raises ConfigError.
    """
    node = plain(node)
    check_value(as_made(node, path), kind, path)
    check(node, path, tuple(provided))


def check_sections(config: dict[str, Any]) -> None:
    """Check a whole config: the names of its sections, and the nodes of `model`, `training` and `data`.

    Raises ConfigError.
    """
    for key in config:
        if key not in SECTIONS:
            hint = did_you_mean(str(key), SECTIONS) or f"; sections are {', '.join(SECTIONS)}"
            raise ConfigError(f"unknown{hint}", str(key))
    for section, provided, keys in (
        ("model", (), NODE_KEYS),
        ("training", ("model",), TRAINING_KEYS),
        ("data", (), NODE_KEYS),
    ):
        if section in config and not is_node(config[section]):
            raise ConfigError("needs a target", section)
        check(config.get(section), section, provided, keys)


def check(node: Any, path: str, provided: Sequence[str] = (), keys: Sequence[str] = TRAINING_KEYS) -> None:
    """Check a plain node and the nodes below it; `keys` may stand in the outermost one."""
    place = path
    if is_node(node):
        _check_node(node, path, provided, keys)
        node, place = node.get("params"), join(path, "params")
    elif isinstance(node, dict):
        _check_that_it_is_no_node(node, path)
    for child_place, child in children(node, place):
        check(child, child_place, keys=NODE_KEYS)


def check_value(value: Any, annotation: Any, place: str) -> None:
    """Raise ConfigError if a value does not fit the annotation of its parameter; None allows everything."""
    if annotation is not None and (problem := mismatch(value, annotation)):
        raise ConfigError(problem, place)


def as_made(value: Any, path: str) -> Any:
    """Return a value in which what a node will make stands in its place. Raises ConfigError for its target."""
    if is_node(value):
        function = find_target(value["target"], path)
        return Made(made_by(function) or object, is_later=bool(given_later(function)))
    if isinstance(value, list):
        return [as_made(child, join(path, index)) for index, child in enumerate(value)]
    return {key: as_made(child, join(path, key)) for key, child in value.items()} if isinstance(value, dict) else value


def walk_made(value: Any, path: str) -> Iterator[tuple[str, type]]:
    """Yield the classes of what nodes make in a value of `as_made`, with their places."""
    if isinstance(value, Made):
        yield path, value.cls
    for place, child in children(value, path):
        yield from walk_made(child, place)


def check_checkpoints(node: Any, path: str) -> None:
    """Raise ConfigError for the first checkpoint below a node that is not there."""
    from ldm.weights.load import locate

    for place, value in walk(node, path):
        if is_node(value) and value.get("checkpoint"):
            try:
                locate(value["checkpoint"])
            except UserError as error:
                raise ConfigError(str(error), join(place, "checkpoint")) from error


def _check_that_it_is_no_node(mapping: dict[str, Any], path: str) -> None:
    """Raise ConfigError for a mapping that was meant to be a node: a misspelt target, or params without any."""
    for key, value in mapping.items():
        if isinstance(value, str) and "." in value and did_you_mean(str(key), ("target",)):
            raise ConfigError("unknown; did you mean target?", join(path, key))
    if isinstance(mapping.get("params"), dict):
        raise ConfigError("needs a target", path)


def _check_node(node: dict[str, Any], path: str, provided: Sequence[str], keys: Sequence[str]) -> None:
    for key in node:
        if key not in keys:
            hint = did_you_mean(str(key), keys) or f"; a node has {', '.join(keys)}"
            raise ConfigError(f"unknown{hint}", join(path, key))
    _check_params(node, path, provided)
    for key, kind in (("checkpoint", str | None), ("ignore_keys", list[str] | None)):
        check_value(node.get(key), kind, join(path, key))
    if node.get("ignore_keys") and not node.get("checkpoint"):
        raise ConfigError("has no effect without checkpoint", join(path, "ignore_keys"))


def _check_params(node: dict[str, Any], path: str, provided: Sequence[str]) -> None:
    target = node["target"]
    function = find_target(target, path)
    expected, later = parameters_of(function), given_later(function)
    params = node.get("params") or {}
    place = join(path, "params")
    if not isinstance(params, dict):
        raise ConfigError("must map parameter names to values", place)
    for name, value in params.items():
        if name in later:
            raise ConfigError("comes from the training (learning_rate); leave it out", join(place, name))
        if name not in expected.names:
            _check_other_name(name, value, params, target, expected, place)
        made = as_made(value, join(place, name))
        check_value(made, expected.hint(name), join(place, name))
        for where, part in walk_made(made, join(place, name)):
            if not may_hold(target, part):
                raise ConfigError(f"{part.__name__} is nothing for {target}", where)
    absent = [name for name in expected.required if name not in params and name not in (*provided, *later)]
    if absent:
        raise missing_parameters(absent, target, place)


def _check_other_name(name: Any, value: Any, params: dict, target: str, expected: Parameters, place: str) -> None:
    """Raise ConfigError for a parameter that a target does not list, unless it takes any and none was meant."""
    made, path = as_made(value, join(place, name)), join(place, name)
    fitting = [known for known in expected.names if expected.hint(known) is None or fits(made, expected.hint(known))]
    slips = [known for known in fitting if isinstance(name, str) and is_slip(name, known)]
    if isinstance(name, str) and expected.open_ended and not slips:
        return
    strange = sum(given not in expected.names for given in params)
    is_the_target = strange == 1 or 2 * strange <= len(params)  # else the target is wrong, and none of its names helps
    near = slips or [known for known in fitting if known not in params]
    hint = did_you_mean(str(name), near if is_the_target else ())
    raise ConfigError(f"unknown{hint or f'; {target} takes ' + (', '.join(expected.names) or 'nothing')}", path)
