"""Packages that only some formats need: imported when they are used, named with their extra where they are absent."""

from __future__ import annotations

import importlib
from types import ModuleType

from ldm.errors import UserError

__all__ = ["require"]


def require(module: str, purpose: str, package: str | None = None, extra: str = "data") -> ModuleType:
    """Import a module. Raises UserError `{purpose} needs the package ...` if it is not installed.

    package: its name on the package index, if it is not the module's.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise UserError(f"{purpose} needs the package {package} (extra `{extra}`): pip install {package}") from error
