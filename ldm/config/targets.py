"""Find the object that a dotted `target` names, and tell which parameters it takes.

A target is `package.module.Class`, `package.module.function` or `package.module.Class.method`. Everything here answers
a spelling mistake with the nearest name that exists.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ldm.config.types import hints_of
from ldm.errors import ConfigError

_OURS = "ldm."


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Phrase a guess at what was meant: `; did you mean NAME?`, or nothing when no name is close."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    matches.sort(key=lambda match: sorted(match) != sorted(name.lower()))  # swapped letters are likelier than others
    return f"; did you mean {by_lower[matches[0]]}?" if matches else ""


def missing_parameters(names: Sequence[str], target: str, path: str) -> ConfigError:
    """Make the error about parameters that a target needs and does not get."""
    return ConfigError(f"{', '.join(names)} missing; {target} needs {'them' if names[1:] else 'it'}", path)


def find_target(target: Any, path: str = "") -> Callable[..., Any]:
    """Import the object that a target names.

    Raises ConfigError (at `path`.target) if a module or attribute does not exist, naming the nearest one, if an import
    fails for another reason, or if the object cannot be called.
    """
    place = f"{path}.target" if path else "target"
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{target!r} is not an import path such as package.module.Class", place)
    parts = target.split(".")
    found, depth = _deepest_module(parts, place)
    for position in range(depth, len(parts)):
        name = parts[position]
        if not hasattr(found, name):
            where = ".".join(parts[:position])
            raise ConfigError(f"{where} has no {name}{did_you_mean(name, _names_in(found))}", place)
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"{target} is {_kind(found)}, not a class or a function", place)
    return found


def _deepest_module(parts: list[str], place: str) -> tuple[ModuleType, int]:
    """Import the longest prefix of a dotted name that is a module; return it with its length in parts."""
    for depth in range(len(parts), 0, -1):
        name = ".".join(parts[:depth])
        try:
            return importlib.import_module(name), depth
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                problem = f"cannot be imported: it needs the package {error.name}, which is not installed"
                raise ConfigError(problem, place) from error
        except ImportError as error:
            raise ConfigError(f"cannot be imported: {error}", place) from error
        except Exception as error:
            error.add_note(f"while importing {name} for {place}")
            raise
    top_level = [module.name for module in pkgutil.iter_modules()]
    raise ConfigError(f"there is no package {parts[0]}{did_you_mean(parts[0], top_level)}", place)


def _names_in(found: Any) -> list[str]:
    names = [name for name in dir(found) if not name.startswith("_")]
    submodules = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    return submodules + names


def _kind(found: Any) -> str:
    return "a module" if isinstance(found, ModuleType) else f"of type {type(found).__name__}"


@dataclass(frozen=True)
class Parameters:
    """The parameters that a callable takes by name; `open_ended` if it accepts names that cannot be known.

    `hints` holds the annotations of our own callables; those of others are not always meant to be taken at their word.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    open_ended: bool
    hints: dict[str, Any] = field(default_factory=dict)


def parameters_of(function: Callable[..., Any]) -> Parameters:
    """List the parameters of a class or function, those that its `**kwargs` hands to a parent class included.

    A catch-all called `kwargs` is taken to be forwarded to the next constructor in the class hierarchy; under another
    name (`**conditioners`) it is the class's own and any key is accepted.
    """
    constructors = _constructors(function) if inspect.isclass(function) else [function]
    names: dict[str, None] = {}
    required: list[str] = []
    hints: dict[str, Any] = {}
    for constructor in constructors:
        if (getattr(constructor, "__module__", None) or "").startswith(_OURS):
            hints = hints_of(constructor) | hints
        try:
            parameters = list(inspect.signature(constructor).parameters.values())
        except (TypeError, ValueError):  # some builtins have no signature
            return Parameters(tuple(names), tuple(required), True, hints)
        catch_all = _collect(parameters, names, required)
        if catch_all != "kwargs":
            return Parameters(tuple(names), tuple(required), catch_all is not None, hints)
    return Parameters(tuple(names), tuple(required), True, hints)


def _constructors(cls: type) -> list[Callable[..., Any]]:
    """The class itself, then the constructors further up that a forwarded `**kwargs` would reach."""
    own = next((base for base in cls.__mro__ if "__init__" in vars(base)), object)
    further = [base.__init__ for base in cls.__mro__[cls.__mro__.index(own) + 1 :] if "__init__" in vars(base)]
    bound = [_without_self(constructor) for constructor in further if constructor is not object.__init__]
    return [cls, *bound]


def _without_self(constructor: Callable[..., Any]) -> Callable[..., Any]:
    return constructor.__get__(object())


def _collect(parameters: list[inspect.Parameter], names: dict[str, None], required: list[str]) -> str | None:
    """Add the named parameters to `names` and `required`; return the name of the catch-all, if there is one."""
    catch_all = None
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            catch_all = parameter.name
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            if parameter.default is parameter.empty and parameter.name not in names:
                required.append(parameter.name)
            names[parameter.name] = None
    return catch_all
