"""Read a foreign torch checkpoint without importing or running anything that it names.

A pickle is a program: it looks up globals and calls them. Here the lookup knows only what rebuilds tensors; every other
name becomes an inert stand-in that swallows its arguments, so that a file with, say, Lightning's callbacks beside its
tensors can be read, and a file that names `os.system` does nothing.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class UnsafeCheckpoint(Exception):
    """A file asks for an operation that reading tensors does not need."""


class _Inert:
    """Stands for an object of a class that is not loaded: accepts every construction, call and change."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Swallow a list item."""

    def extend(self, values: Any) -> None:
        """Swallow list items."""

    def add(self, value: Any) -> None:
        """Swallow a set item."""


class _Allowed:
    """A function that may be called; without attributes, so that a pickle cannot change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise UnsafeCheckpoint("it tries to change a function")


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    """Stand for torch's rebuilding of a parameter: keep the values, drop the hooks."""
    if not isinstance(data, torch.Tensor):
        raise UnsafeCheckpoint("it holds a parameter without values")
    return data


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """Stand for torch's rebuilding of a tensor from a part of a storage, without its hooks."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnsafeCheckpoint("it holds a tensor without a storage")
    return torch._utils._rebuild_tensor(storage, int(offset), tuple(size), tuple(stride))


_FUNCTIONS = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    """Looks up the names that tensors need; answers every other one with a stand-in."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle means by a global name; never imports."""
        if (module, name) in _FUNCTIONS:
            return _Allowed(_FUNCTIONS[module, name])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return type("_Inert", (_Inert,), {})


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def load_inert(path: Path, mmap: bool) -> Any:
    """Load a file of torch.save (zip or old format) onto the CPU, with stand-ins for all that is not a tensor.

    `mmap` maps the tensors instead of copying them (zip format only). Raises UnsafeCheckpoint for a pickle that does
    what reading tensors never needs, and what torch.load raises for a damaged file.
    """
    module = SimpleNamespace(__name__="ldm.unpickling", Unpickler=_Unpickler, load=_load)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap, pickle_module=module)
    except (AttributeError, TypeError, AssertionError, ImportError) as error:
        raise UnsafeCheckpoint(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
