"""One table of rules a component, one engine that reads and writes its config by them.

A component is one network of a folder that diffusers or transformers wrote: its `config.json` on their side, a node on
ours. A rule ties some of their fields to some of our parameters. What neither side can say of the other is refused by
the name under which it was written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ldm.config.nodes import is_node
from ldm.config.targets import find_target
from ldm.config.types import mismatch
from ldm.errors import ConfigError

Values = dict[str, Any]
Node = dict[str, Any]
SWITCHED_OFF = (None, False)
# The published folders are older than today's names of attention.
OLD_ATTENTION = {
    r"\.query\.": ".to_q.",
    r"\.key\.": ".to_k.",
    r"\.value\.": ".to_v.",
    r"\.proj_attn\.": ".to_out.0.",
}


class Rename(NamedTuple):
    """A module's name on both sides, the beginning of the names of its tensors.

    theirs: one name, or three for queries, keys and values, which ours holds joined, or none for what is left out.
    axes: trailing axes of size 1 that the weight has here, a convolution, and not there, a linear layer.
    groups: of the joined queries, keys and values: (groups, 3, width) in the first axis.
    transposed: whether a matrix is the transposed of the other side's.
    """

    ours: str
    theirs: tuple[str, ...]
    axes: int = 0
    groups: int = 1
    transposed: bool = False


def renamed(ours: str, theirs: str, table: Mapping[str, str]) -> list[Rename]:
    """Rename the children of a module, and itself with those that have the same name on both sides."""
    inner = [Rename(f"{ours}.{old}", (f"{theirs}.{new}",)) for old, new in table.items()]
    return [Rename(ours, (theirs,)), *inner]


@dataclass(frozen=True)
class Rule:
    """Some of their fields, each with its annotation and their default, and some of our parameters, in both directions.

    read: from all their fields to these parameters; write: from all our parameters to these fields.
    """

    fields: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    parameters: Sequence[str] = ()
    read: Callable[[Values], Values] = lambda theirs: {}
    write: Callable[[Values], Values] = lambda ours: {}


def same(name: str, kind: Any, default: Any, ours: str | None = None) -> Rule:
    """Carry a value over under its other name."""
    ours = ours or name
    return Rule({name: (kind, default)}, (ours,), lambda t: {ours: t[name]}, lambda o: {name: o[ours]})


def chosen(name: str, default: Any, ours: str, values: Mapping[Any, Any]) -> Rule:
    """Carry over one of a few values, `values` from theirs to ours."""

    def read(theirs: Values) -> Values:
        return {ours: values[_one_of(theirs[name], values, name)]}

    def write(parameters: Values) -> Values:
        back = {value: key for key, value in values.items()}
        return {name: back[_one_of(parameters[ours], back, ours)]}

    return Rule({name: (Any, default)}, (ours,), read, write)


def fixed(name: str, value: Any, *others: Any, default: Any = ...) -> Rule:
    """Insist on a field's value, which is written; `others` say the same."""

    def read(theirs: Values) -> Values:
        _one_of(theirs[name], (value, *others), name)
        return {}

    return Rule({name: (Any, value if default is ... else default)}, (), read, lambda ours: {name: value})


def only(ours: str, value: Any, reason: str) -> Rule:
    """Insist on a value of our parameter, for which they have no field."""

    def write(parameters: Values) -> Values:
        if parameters[ours] != value:
            raise ConfigError(f"{parameters[ours]!r} has no counterpart: {reason}", ours)
        return {}

    return Rule({}, (ours,), write=write)


def uniform(name: str, kind: Any, default: Any, ours: str) -> Rule:
    """Carry over a number that they may also write as a list of equal numbers, one a level."""

    def read(theirs: Values) -> Values:
        values = theirs[name] if isinstance(theirs[name], (list, tuple)) else [theirs[name]]
        if len(set(values)) != 1:
            raise ConfigError(f"{theirs[name]} differs between levels, which our network cannot", name)
        return {ours: values[0]}

    return Rule({name: (kind | list[kind], default)}, (ours,), read, lambda parameters: {name: parameters[ours]})


def multiples(widths: Sequence[int], field: str) -> list[int]:
    """Return the widths of levels as multiples of the first. ConfigError if they are none."""
    if not widths or any(width % widths[0] for width in widths):
        raise ConfigError(f"{list(widths)} are no multiples of the first, as our networks have them", field)
    return [width // widths[0] for width in widths]


def _one_of(value: Any, allowed: Any, name: str) -> Any:
    if isinstance(value, (list, dict)) or value not in allowed:
        raise ConfigError(f"{value!r} is not supported; only {' or '.join(map(repr, allowed))}", name)
    return value


@dataclass(frozen=True, eq=False)  # one object a kind
class Component:
    """One network on both sides.

    Args:
        name: Their class.
        target: Ours.
        rules: What ties the configs.
        names: From our parameters and their fields to the renaming of weights.
        children: Our parameters that are nodes of their own, and their targets.
        unused: Our parameters that say nothing about the network's function.
        ignored: Their fields that say nothing about it.
        aliases: Older names of their tensors, as regular expressions, and today's.
        weights: Name of the file of weights, without ending.
        is_open: Their file also describes what is no part of the network, so unknown fields mean nothing.
    """

    name: str
    target: str
    rules: tuple[Rule, ...]
    names: Callable[[Values, Values], list[Rename]]
    children: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: OLD_ATTENTION)
    weights: str = "diffusion_pytorch_model"
    is_open: bool = False

    def read(self, config: Values) -> Values:
        """Return our parameters, those of all children together. ConfigError names the field that is refused."""
        known = {name: value for rule in self.rules for name, value in rule.fields.items()}
        theirs = {name: config.get(name, default) for name, (_, default) in known.items()}
        for name, (kind, _) in known.items():
            if problem := mismatch(theirs[name], kind):
                raise ConfigError(problem, name)
        for name, value in config.items():
            known_or_off = name in known or name in self.ignored or name.startswith("_") or value in SWITCHED_OFF
            if not (known_or_off or self.is_open):
                raise ConfigError(f"{value!r} is not supported: {self.name} is read without it", name)
        return {key: value for rule in self.rules for key, value in rule.read(theirs).items()}

    def node(self, parameters: Values) -> Node:
        """Return our node with these parameters."""
        own = dict(parameters)
        for child, target in self.children.items():
            inner = {name: own.pop(name) for name in defaults_of(target) if name in own and name != child}
            own[child] = {"target": target, "params": inner}
        return {"target": self.target, "params": own}

    def parameters(self, node: Node) -> tuple[Values, dict[str, str]]:
        """Return all parameters of our node and its children, defaults included, and where each stands in it."""
        values, places = {}, {}
        given = node.get("params") or {}
        for name, default in defaults_of(self.target).items():
            if name in self.children:
                child = given[name] if is_node(given.get(name)) else {}
                inner = defaults_of(self.children[name]) | (child.get("params") or {})
                values |= inner
                places |= {key: f"params.{name}.params.{key}" for key in inner}
            else:
                values[name], places[name] = given.get(name, default), f"params.{name}"
        return values, places

    def write(self, node: Node) -> Values:
        """Return their fields. ConfigError names the parameter that they cannot express."""
        values, places = self.parameters(node)
        known = {name for rule in self.rules for name in rule.parameters} | set(self.unused)
        defaults = {name: value for target in (self.target, *self.children.values()) for name, value in
                    defaults_of(target).items()}  # fmt: skip
        try:
            for name, value in values.items():
                if name not in known and value != defaults.get(name):
                    raise ConfigError(f"{value!r} has no counterpart in {self.name}", name)
            written = [(rule, rule.write(values)) for rule in self.rules]
            for rule, fields in written:
                for name, (kind, _) in rule.fields.items():
                    if problem := mismatch(fields[name], kind):
                        raise ConfigError(f"{problem}, as {self.name} has it", rule.parameters[0])
            return {name: value for _, fields in written for name, value in fields.items()}
        except ConfigError as error:
            raise ConfigError(f"diffusers: {error.problem}", places.get(error.path, error.path)) from error


def defaults_of(target: str) -> Values:
    """Return the parameters of a class of ours with their defaults; those without have `...`."""
    signature = inspect.signature(find_target(target))
    return {name: ... if p.default is p.empty else p.default for name, p in signature.parameters.items()}
