"""Samplers: frozen dataclasses, each a generator of steps over a denoiser; found by name in this folder."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from contextlib import suppress
from typing import Any

from ldm.errors import UserError


def sampler_names() -> list[str]:
    """Return the names of all samplers, which are those of the files in this folder: ddim, heun, ..."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def sampler_class(name: str) -> type:
    """Return the sampler of the file with this name, the one dataclass in it. UserError for an unknown name."""
    if name not in sampler_names():
        raise UserError(f"sampler '{name}' is unknown; use one of {', '.join(sampler_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    members = (cls for _, cls in inspect.getmembers(module, dataclasses.is_dataclass))
    return next(cls for cls in members if cls.__module__ == module.__name__)


def sampler_options(name: str) -> dict[str, str]:
    """Return the names of the options of a sampler with their types. UserError for an unknown name."""
    return {field.name: str(field.type) for field in dataclasses.fields(sampler_class(name))}


def make_sampler(name: str, **options: Any) -> Any:
    """Make a sampler by its name, also `NAME:option=value,option=value`.

    UserError for an option, other than None, that it does not have, and for one that is no number where one is due.
    """
    name, _, rest = name.partition(":")
    types = sampler_options(name)
    given = {key: value for key, value in options.items() if value is not None}
    if rest:
        from ldm.pairs import pairs_of  # which only a command line needs

        given |= pairs_of(rest.split(","), f"sampler {name}")
    if unknown := [key for key in given if key not in types]:
        raise UserError(f"sampler {name}: has no {unknown[0]}; it has {', '.join(types)}")
    return sampler_class(name)(**{key: _read(name, key, value, types[key]) for key, value in given.items()})


def _read(name: str, key: str, value: Any, kind: str) -> Any:
    """Return the number that a text stands for; other values, and names of grids, as they are."""
    if not isinstance(value, str) or key == "grid":
        return value
    is_whole = kind.startswith(("int", "bool"))
    with suppress(ValueError):
        return int(value) if is_whole else float(value)
    raise UserError(f"sampler {name}: {key}={value} is no {'whole ' if is_whole else ''}number")
