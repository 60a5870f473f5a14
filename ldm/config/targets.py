"""Find the object that a dotted `target` names.

A target is `package.module.Class`, `package.module.function` or `package.module.Class.method`, in a package that is
trusted (see `ldm.config.trust`). A spelling mistake is answered with the nearest name, if a target of that name exists.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from ldm.config import trust
from ldm.errors import ConfigError, did_you_mean, shown  # noqa: F401 (who reads configs looks for it here)


def is_slip(written: str, meant: str) -> bool:
    """Return whether two words differ by their capitals and at most one letter: left out, added, changed or swapped."""
    a, b = sorted((written.lower(), meant.lower()), key=len)
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    rests = {(a[start:], b[start + 1 :]), (a[start + 1 :], b[start + 1 :])}
    swapped = a[start : start + 2][::-1] + a[start + 2 :] == b[start:]
    return a == b or swapped or any(x == y for x, y in rests)


def missing_parameters(names: Sequence[str], target: str, path: str) -> ConfigError:
    """Make the error about parameters that a target needs and does not get."""
    return ConfigError(f"{', '.join(names)} missing; {target} needs {'them' if names[1:] else 'it'}", path)


def find_target(target: Any, path: str = "", is_called: bool = True) -> Callable[..., Any]:
    """Import the class or constructor that a target names; with `is_called` false any function that is defined there.

    Raises ConfigError (at `path`.target) for what is not trusted, before anything is imported; if a module or attribute
    does not exist; if an import fails for another reason; and for an object that is not for a config to call.
    """
    return _find(target, f"{path}.target" if path else "target", is_called)


def _find(target: Any, place: str, is_called: bool = True, guesses: bool = True) -> Callable[..., Any]:
    if not isinstance(target, str) or "." not in target or not all(map(str.isidentifier, target.split("."))):
        raise ConfigError(f"{shown(repr(target))} is not an import path such as package.module.Class", place)
    parts, home = target.split("."), trust.home_of(target)
    if not home or (home in trust.TRUSTED and any(part.startswith("_") for part in parts)):
        raise ConfigError(_untrusted(parts, guesses), place)
    trust.let_import(home)
    holder, depth = _deepest_module(parts, place)
    module, found = holder.__name__, holder
    for position in range(depth, len(parts)):
        name, holder = parts[position], found
        if not hasattr(holder, name):
            hint = _hint(parts, position, _names_in(holder)) if guesses else ""
            raise ConfigError(f"{'.'.join(parts[:position])} has no {shown(name)}{hint}", place)
        found = getattr(holder, name)
    if problem := trust.problem_of(found, holder, module, home, is_called, target):
        raise ConfigError(f"{shown(target, 120)} {problem}", place)
    return found


def _untrusted(parts: list[str], guesses: bool) -> str:
    target, near = ".".join(parts), list(zip(*(home.split(".")[:2] for home in trust.TRUSTED), strict=True))
    if hint := guesses and (_hint(parts, 0, near[0]) or _hint(parts, 1, near[1])):
        return f"{shown(target, 120)} is unknown{hint}"
    return f"{shown(target, 120)} cannot be called: {trust.why_not(target)}"


def _hint(parts: list[str], position: int, names: Iterable[str]) -> str:
    """Guess what was meant by one part of a target: a name by a slip of the fingers away that makes it a good one."""
    for guess in sorted(set(names)):
        if guess != parts[position] and is_slip(parts[position], guess):
            try:
                _find(".".join([*parts[:position], guess, *parts[position + 1 :]]), "", guesses=False)
            except ConfigError:
                continue
            return f"; did you mean {guess}?"
    return ""


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
    raise ConfigError(f"there is no package {parts[0]}", place)


def _names_in(found: Any) -> list[str]:
    names = [name for name in dir(found) if not name.startswith("_")]
    if inspect.ismodule(found):
        names += [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    return names
