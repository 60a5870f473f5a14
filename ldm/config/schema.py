"""A JSON schema of our YAML, made from the annotations that values are checked against, for completion in editors.

What it refuses, `ldm.config.load` refuses too; what only the whole of a config shows (a missing parameter, channels
that do not divide) it cannot know, since a file may be a part that others complete. Draft 7, which editors know best.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union

from ldm.bounds import Bound, Ge, Gt, Le, Lt, Most
from ldm.config.check import TRAINING_KEYS
from ldm.config.nodes import NODE_KEYS, REFERENCE_KEYS
from ldm.config.parameters import parameters_of
from ldm.config.trust import TRUSTED, is_within, made_by, problem_of
from ldm.config.types import Made, fits

Schema = dict[str, Any]
_DRAFT = "http://json-schema.org/draft-07/schema#"
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string"}
_BOUNDS = {Ge: "minimum", Gt: "exclusiveMinimum", Le: "maximum", Lt: "exclusiveMaximum", Most: "maxItems"}
_OPEN = (
    "open"  # any value may be an interpolation, be still to be given, or be null, which takes away what a base gives
)
_PARAMS = "params"
_NULL = {"type": "null"}


def schema(lightning: Mapping[str, Any], trainer: Mapping[str, Any]) -> Schema:
    """Return the schema of a config file.

    Args:
        lightning: the annotation of every key of the section `lightning`, None for one that says nothing.
        trainer: the same of `lightning.trainer`.
    """
    made = _Definitions(_targets())
    made.describe_all()
    numbers = {"learning_rate": float, "base_learning_rate": float, "global_batch": int}
    training = {**numbers, "allow_untrained_first_stage": bool}
    sections = {
        "base": _value({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
        "model": made.node(None),
        "training": made.node(None, {name: made.of(training[name]) for name in TRAINING_KEYS if name in training}),
        "data": made.node(None),
        "lightning": _mapping({name: made.of(kind) for name, kind in lightning.items()}),
    }
    sections["lightning"]["properties"]["trainer"] = _value(
        _mapping({name: {} if kind is None else made.of(kind) for name, kind in trainer.items()})
    )
    return {"$schema": _DRAFT, "title": "latent diffusion", **_mapping(sections), "definitions": made.definitions}


class _Definitions:
    """The schemas of parameters and of places for nodes, each once; `targets` are all that a node of ours can name."""

    def __init__(self, targets: Mapping[str, Callable[..., Any]]) -> None:
        self.targets = targets
        self.definitions: dict[str, Schema] = {
            _OPEN: {"anyOf": [{"type": "string", "pattern": r"\$\{|^\?\?\?$"}, _NULL]}
        }
        self._places: dict[str, str] = {}  # names of the definitions of annotations that ask for nodes
        self._choices: dict[tuple[str, ...], str] = {}  # names of the definitions of targets of which one may be named

    def of(self, annotation: Any) -> Schema:
        """Return the schema of a value of a parameter."""
        return {} if annotation is None else _value(*self._alternatives(annotation))

    def node(self, annotation: Any, more: Mapping[str, Schema] | None = None) -> Schema:
        """Return the schema of a node whose object an annotation asks for; `more`: keys that it has beside `target`."""
        fitting = [
            name
            for name, target in self.targets.items()
            if annotation is None or fits(Made(made_by(target) or object), annotation)
        ]
        keys = dict.fromkeys((*NODE_KEYS, *REFERENCE_KEYS), {}) | dict(more or {})
        keys["target"] = self._choice(fitting)
        keys["checkpoint"] = _value({"type": "string"})
        keys["ignore_keys"] = _value({"type": "array", "items": {"type": "string"}})
        return {"allOf": [_reference(_PARAMS)], **_mapping(keys)}

    def _choice(self, targets: Sequence[str]) -> Schema:
        """Return the schema of one of these targets of ours, or of one that is not ours, by reference."""
        name = self._choices.setdefault(tuple(targets), f"targets {len(self._choices) + 1}")
        self.definitions[name] = _value({"enum": list(targets)}, {"type": "string", "not": {"pattern": r"^ldm\."}})
        return _reference(name)

    def describe_all(self) -> None:
        """Define the parameters of every target, and that the params of a node are those of its target."""
        rules = []
        for name, target in self.targets.items():
            parameters = parameters_of(target)
            described = {parameter: self._place(parameters.hint(parameter)) for parameter in parameters.names}
            other = self._place(parameters.other) if parameters.open_ended else False
            self.definitions[name] = {**_mapping(described), "additionalProperties": other}
            condition = {"properties": {"target": {"const": name}}, "required": ["target"]}
            params = {"anyOf": [_reference(name), _NULL]}
            rules.append({"if": condition, "then": {"properties": {"params": params}}})
        self.definitions[_PARAMS] = {"allOf": rules}

    def _place(self, annotation: Any) -> Schema:
        """Return the schema of a value, by reference where it is one for nodes, which is long."""
        whole = self.of(annotation)
        if _PARAMS not in str(whole):
            return whole
        name = self._places.setdefault(str(annotation), f"place {len(self._places) + 1}")
        self.definitions[name] = whole
        return _reference(name)

    def _alternatives(self, annotation: Any) -> list[Schema]:
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Annotated:
            bounds = {_BOUNDS[type(bound)]: bound.limit for bound in arguments[1:] if isinstance(bound, Bound)}
            return [option | bounds for option in self._alternatives(arguments[0])]
        if origin in (Union, types.UnionType):
            return [option for argument in arguments for option in self._alternatives(argument)]
        if origin is Literal:
            return [{"enum": list(arguments)}]
        if annotation is types.NoneType:
            return [_NULL]
        kind = origin or annotation
        if not isinstance(kind, type) or kind in (object, Any):
            return [{}]
        if kind in _PLAIN:
            return [{"type": _PLAIN[kind]}]
        if issubclass(kind, PurePath):
            return [{"type": "string"}]
        if issubclass(kind, Mapping):
            return [{"type": "object", "additionalProperties": self.of(arguments[1]) if arguments[1:] else {}}]
        if issubclass(kind, Collection) and kind.__module__ in ("builtins", "collections.abc"):
            return [self._list(kind, arguments)]
        return [self.node(annotation)]

    def _list(self, kind: type, arguments: tuple[Any, ...]) -> Schema:
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            items = [self.of(argument) for argument in arguments]
            return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "items": self.of(arguments[0]) if arguments else {}}


def _targets() -> dict[str, Callable[..., Any]]:
    """Find the classes and constructors of ours that a config may name, by their targets."""
    return {name: part for home in TRUSTED if is_within(home, "ldm") for name, part in _targets_in(home)}


def _targets_in(home: str) -> Iterator[tuple[str, Any]]:
    package = importlib.import_module(home)
    inner = pkgutil.walk_packages(getattr(package, "__path__", []), f"{home}.")
    for name in (home, *(found.name for found in inner)):
        try:
            module = importlib.import_module(name)
        except ImportError:  # of an extra that is not installed
            continue
        for attribute, found in vars(module).items():
            if attribute.startswith("_"):
                continue
            members = [(attribute, found, module)]
            if inspect.isclass(found) and found.__module__ == name:
                functions = (key for key, value in vars(found).items() if isinstance(value, classmethod | staticmethod))
                members += [(f"{attribute}.{key}", getattr(found, key), found) for key in functions if key[0] != "_"]
            for place, part, holder in members:
                if callable(part) and not problem_of(part, holder, name, home) and made_by(part) is not None:
                    yield f"{name}.{place}", part


def _mapping(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name.replace(' ', '%20')}"}


def _value(*alternatives: Schema) -> Schema:
    """Return the schema of what is one of these, open, or taken away."""
    if {} in alternatives:
        return {}
    return {"anyOf": [*(option for option in alternatives if option != _NULL), _reference(_OPEN)]}
