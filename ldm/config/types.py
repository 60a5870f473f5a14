"""Compare values of a config with the annotations of the parameters that they are meant for.

Strict where YAML surprises: true is no number, 1e-4 (which YAML reads as text) is none either, a number is no text; but
a whole number serves as float, and a list as any sequence. `Annotated[int, Ge(1)]` bounds a number (see `ldm.bounds`).
Where an object is meant, one of its class serves, or for a protocol one that has its methods; of what a node will make
the class is known before (`Made`). Annotations that say nothing allow all.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union

from ldm.bounds import Bound
from ldm.errors import shown

_PLAIN = (bool, int, float, str)
_FROM_YAML = (*_PLAIN, list, dict, types.NoneType)
_OF_A_DATASET = ("__getitem__",)  # torch asks no data set to derive from its class


@dataclass(frozen=True)
class Made:
    """Stand for the object that a node will make; `is_later` if the node becomes what makes it, when it is called."""

    cls: type
    is_later: bool = False


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of the parameters of a class or function; none where they cannot be evaluated."""
    try:
        return typing.get_type_hints(function.__init__ if isinstance(function, type) else function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def mismatch(value: Any, annotation: Any) -> str:
    """Return what a value should be instead, or nothing if it fits an annotation."""
    if fits(value, annotation):
        return ""
    hint = " (YAML reads 1e-4 as text; write 1.0e-4)" if _is_text_of_a_number(value) else ""
    return f"{_shown(value)} is not {_name(annotation)}{hint}"


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value can be given where an annotation stands."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return fits(value, arguments[0]) and all(bound.allows(value) for bound in _bounds(arguments))
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
    if annotation is None or annotation is types.NoneType:
        return value is None
    kind = origin or annotation
    if not isinstance(kind, type) or kind in (object, Any):
        return True
    if kind is Callable:
        return _returns(value, arguments[-1] if arguments else Any) if isinstance(value, Made) else callable(value)
    if isinstance(value, Made) and value.is_later:
        return False
    if kind in _PLAIN:
        is_number = kind is float and type(value) is int and abs(value) < 1 << 1000  # a float holds no larger ones
        return (type(value) is kind or is_number) and not (type(value) is float and math.isnan(value))
    if issubclass(kind, PurePath):
        return isinstance(value, (str, kind))
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and _all_fit(value.values(), arguments[1:2])
    if kind is not str and issubclass(kind, Collection) and kind.__module__ in ("builtins", "collections.abc"):
        return _fits_sequence(value, kind, arguments)
    if isinstance(value, Made):
        return _is_a(value.cls, kind)
    return not isinstance(value, _FROM_YAML) and _is_a(type(value), kind) and _has_fields(value, kind)


def _returns(made: Made, kind: Any) -> bool:
    """Return whether what a node makes can be called and, where that should give an object, is known to give one."""
    is_object = isinstance(kind, type) and kind not in (*_PLAIN, object)
    result = made.cls if made.is_later else hints_of(getattr(made.cls, "__call__", None)).get("return")  # noqa: B004
    gives = isinstance(result, type) and issubclass(result, kind) if is_object else not made.is_later
    return gives and (made.is_later or _has(made.cls, ("__call__",)))


def _is_a(cls: type, kind: type) -> bool:
    """Return whether objects of a class serve where a class, or a protocol, is meant."""
    if getattr(kind, "_is_protocol", False):
        methods = {name for base in kind.__mro__ for name, part in vars(base).items() if inspect.isfunction(part)}
        return _has(cls, methods - {"__init__", "__subclasshook__"})
    if (kind.__module__, kind.__name__) == ("torch.utils.data.dataset", "Dataset"):
        return _has(cls, _OF_A_DATASET)
    return issubclass(cls, kind)


def _has_fields(value: Any, kind: type) -> bool:
    """Return whether an object has the attributes that a protocol declares, which its class need not show."""
    if not getattr(kind, "_is_protocol", False):
        return True
    return all(hasattr(value, name) for base in kind.__mro__ for name in inspect.get_annotations(base))


def _has(cls: type, methods: Collection[str]) -> bool:
    return all(any(name in vars(base) for base in cls.__mro__) for name in methods)


def _bounds(arguments: Sequence[Any]) -> list[Bound]:
    return [bound for bound in arguments[1:] if isinstance(bound, Bound)]


def _fits_sequence(value: Any, kind: type, arguments: Sequence[Any]) -> bool:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        return False
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    return _all_fit(value, arguments[:1])


def _all_fit(values: Collection[Any], arguments: Sequence[Any]) -> bool:
    return not arguments or all(fits(value, arguments[0]) for value in values)


def _is_text_of_a_number(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, (*_FROM_YAML, tuple)):
        return shown(" ".join(repr(value).split()))
    return f"a {(value.cls if isinstance(value, Made) else type(value)).__name__}"


def _name(annotation: Any) -> str:
    """Write an annotation as people say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return ", ".join([_name(arguments[0]), *map(str, _bounds(arguments))])
    if origin in (Union, types.UnionType):
        return " or ".join(_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if annotation is types.NoneType:
        return "null"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if annotation in words:
        return words[annotation]
    name = getattr(origin or annotation, "__name__", str(annotation))
    if origin is None or not arguments:
        return f"a {name}"
    if issubclass(origin, Mapping):
        return "a mapping"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} ({', '.join(map(_name, arguments))})"
    return f"a list ({_name(arguments[0])} each)" if issubclass(origin, Collection) else f"a {name}"
