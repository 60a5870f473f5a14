"""Read a foreign torch checkpoint without importing or running anything that it names.

A pickle is a program that looks up globals and calls them. Here the lookup knows only what rebuilds tensors; every
other name becomes an inert class that ignores its arguments: a file with Lightning's callbacks next to its tensors can
be read, and a file that names `os.system` does nothing. `audit` runs the program in the same way before any tensor is
made, and compares the sizes that it declares with those of the file.

torch's `weights_only=True` with `safe_globals` does not replace this: it refuses the lists and dicts of other classes
that published Lightning checkpoints have, and allocates what a file declares.
"""

import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class UnsafeCheckpoint(Exception):
    """A file asks for an operation that reading tensors does not need."""


class _Inert:
    """Replaces every class that is not loaded: accepts every construction, call and change."""

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
        """Ignore a list item."""

    def extend(self, values: Any) -> None:
        """Ignore list items."""

    def add(self, value: Any) -> None:
        """Ignore a set item."""


class _Allowed:
    """A function that may be called, but has no attributes that a pickle could change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise UnsafeCheckpoint("it tries to change a function")


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    """Rebuild a parameter as torch does, as a plain tensor without its hooks."""
    if not isinstance(data, torch.Tensor):
        raise UnsafeCheckpoint("it holds a parameter without values")
    return data


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """Rebuild a tensor from a part of a storage as torch does, without its hooks."""
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


class _Unpickler(pickle._Unpickler):
    """Looks up the names that tensors need; every other name is an inert class.

    Not the faster C class, in which a few bytes of a file can allocate gigabytes for the memo.
    """

    functions: Mapping[tuple[str, str], Callable[..., Any]] = _FUNCTIONS

    def find_class(self, module: str, name: str) -> Any:
        """Return the object of a global name, without an import."""
        if (module, name) in self.functions:
            return _Allowed(self.functions[module, name])
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
    """Return the content of a file of torch.save (zip or old format) on the CPU, inert objects for all but tensors.

    `mmap` maps the tensors instead of copying them (zip format only). UnsafeCheckpoint for operations that reading
    tensors never needs; a damaged file raises what torch.load raises.
    """
    module = SimpleNamespace(__name__="ldm.weights.audit", Unpickler=_Unpickler, load=_load)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap, pickle_module=module)
    except (AttributeError, TypeError, AssertionError, ImportError) as error:
        raise UnsafeCheckpoint(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


# -------------------------------------------------------------------------------------------------------------- audit


@dataclass(frozen=True)
class _Declared:
    """A storage as a file declares it: `count` elements of `width` bytes."""

    count: int
    width: int


_EXPANDED = 1 << 24  # more elements than this, added by strides of 0, are refused
_WIDTHS = {
    **{f"{name}Storage": 1 for name in ("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")},
    **{f"{name}Storage": 2 for name in ("Short", "Half", "BFloat16")},
    **{f"{name}Storage": 4 for name in ("Int", "Float", "QInt32")},
    **{f"{name}Storage": 8 for name in ("Long", "Double", "ComplexFloat")},
    "ComplexDoubleStorage": 16,
}
_DAMAGED = (pickle.UnpicklingError, EOFError, ValueError, LookupError, RuntimeError, OverflowError, struct.error)
_PART_OF_LEGACY = 4  # magic number, protocol, system, content


def _declared_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Declared:
    """Check that a tensor lies within its storage."""
    if not isinstance(storage, _Declared):
        raise UnsafeCheckpoint("it holds a tensor without a storage")
    width = rest[2].itemsize if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.width
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(not isinstance(number, int) or number < 0 for number in numbers):
        raise UnsafeCheckpoint("it holds a tensor whose shape makes no sense")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    available, elements = storage.count * storage.width // width, math.prod(size)
    if elements > 0 and (last >= available or elements > available + _EXPANDED):
        raise UnsafeCheckpoint(f"it holds a tensor of shape {tuple(size)} in a storage of {available} elements")
    return storage


def _declared_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuilt(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return function(*args) if isinstance(function, _Allowed) else _Inert()


def _never(*_: Any) -> Any:
    raise UnsafeCheckpoint("it asks for memory that no tensor of a state dict needs")


_AUDITED = {
    **dict.fromkeys([key for key, value in _FUNCTIONS.items() if value is _tensor], _declared_tensor),
    **dict.fromkeys([key for key, value in _FUNCTIONS.items() if value is _parameter], _declared_parameter),
    ("torch._utils", "_rebuild_tensor_v3"): _declared_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuilt,
    **dict.fromkeys([("torch._utils", "_rebuild_qtensor"), ("builtins", "bytearray")], _never),
    **dict.fromkeys([("__builtin__", "bytearray"), ("torch._utils", "_rebuild_sparse_tensor")], _never),
}


class _Auditor(_Unpickler):
    """Runs a pickle with declarations instead of storages; sizes(key) is the number of bytes in the file."""

    functions = _AUDITED

    def __init__(self, file: Any, sizes: Callable[[str], int]) -> None:
        super().__init__(file, encoding="utf-8")
        self._sizes = sizes
        self.declared: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the width of a kind of storage; other names as for reading."""
        if module.startswith("torch") and name == "UntypedStorage":
            return 1
        if module == "torch" and name in _WIDTHS:
            return _WIDTHS[name]
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Declared:
        """Check and record the storage that a pickle refers to."""
        _, width, key, _, count, *view = pid
        if not (isinstance(width, int) and isinstance(count, int) and count >= 0):
            raise UnsafeCheckpoint("it declares a storage that makes no sense")
        if count * width > self._sizes(str(key)):
            raise UnsafeCheckpoint(f"it declares a storage of {count * width} bytes, more than the file has of it")
        self.declared[str(key)] = count * width
        if view and view[0] is not None:
            _, offset, length = view[0]
            if min(offset, length) < 0 or offset + length > count:
                raise UnsafeCheckpoint("it declares a view beyond its storage")
            return _Declared(length, width)
        return _Declared(count, width)


def audit(path: Path) -> None:
    """Check, before anything is allocated or run, that a file of torch.save has all bytes that it declares.

    UnsafeCheckpoint for operations that no state dict needs, ValueError for a damaged or truncated file.
    """
    try:
        if zipfile.is_zipfile(path):
            _audit_zip(path)
        else:
            _audit_legacy(path)
    except _DAMAGED as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    except (AttributeError, TypeError, AssertionError) as error:
        raise UnsafeCheckpoint(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _audit_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        stored = sum(entry.file_size for entry in entries)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or stored > path.stat().st_size:
            raise UnsafeCheckpoint("it is compressed, which torch.save never does: it could fill any memory")
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
        (program,) = (entry for entry in entries if entry.filename.partition("/")[2] == "data.pkl")
        with archive.open(program) as file:
            _Auditor(file, lambda key: sizes.get(f"data/{key}", -1)).load()


def _audit_legacy(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(_PART_OF_LEGACY):
            auditor = _Auditor(content, lambda key: size)
            auditor.load()
        if sum(auditor.declared.values()) > size - content.tell():
            raise EOFError("the end of its tensors is missing")
