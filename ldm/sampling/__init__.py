"""Samplers: frozen dataclasses, each a generator of steps over a denoiser; found by name in this folder."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
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


def make_sampler(name: str, **options: Any) -> Any:
    """Make a sampler by its name. UserError for an option, other than None, that it does not have."""
    cls = sampler_class(name)
    given = {key: value for key, value in options.items() if value is not None}
    fields = [field.name for field in dataclasses.fields(cls)]
    if unknown := [key for key in given if key not in fields]:
        raise UserError(f"sampler {name}: has no {unknown[0]}; it has {', '.join(fields)}")
    return cls(**given)
