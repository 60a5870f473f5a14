"""Read a file of torch.save with an interpreter of our own: nothing that the file names is imported, called or run.

A pickle is a program for a small stack machine that looks up names and calls them. Here that machine knows lists,
dicts, plain values and the few functions that rebuild tensors. Every other name of a file to take weights from stands
for one inert object, so that what Lightning pickled beside its tensors can be read and `os.system` does nothing; in a
checkpoint to resume from it is refused. Operations, calls, depth and what the content takes when written out are
bounded; tensors are views of the mapped file and lie within it. Torch's own reader is not asked: two readers may
find two programs in one archive.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from torch import Tensor, UntypedStorage

from ldm.errors import UserError, shown
from ldm.weights.archives import DAMAGED, ZIP_MAGIC, directory

_MOST_OPERATIONS = 1 << 21  # a tensor of a state dict takes about 35
_MOST_CALLS = 1 << 18  # ... and two of these
_LONGEST_PROGRAM = 1 << 25  # bytes
_DEEPEST = 100
_MOST_DIMENSIONS = 64
_SPARE = 1 << 26  # bytes that a small file may hold when its tensors are written out
_COPIES = 4  # times its size that a large one may: several names share a tensor
_ALIGNMENT = 16  # bytes of the widest number
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PARTS_OF_LEGACY = 5  # magic number, protocol, system, content, keys of the storages in their order
_DAMAGED = (*DAMAGED, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, struct.error)


class Unsafe(Exception):
    """A file asks for what reading tensors does not need."""


def read_torch(path: Path, resumed: bool = False, checksums: bool = True) -> Any:
    """Return the content of a file of torch.save (zip or old format) on the CPU, its tensors mapped from the file.

    UserError for a file of another format, a damaged one, and one that asks for more than tensors and plain values.

    Args:
        path: A file; it is opened once, and may be replaced while its tensors are in use.
        resumed: Refuse other classes by name instead of ignoring them, and copy the tensors into memory.
        checksums: Compare the CRC-32 of every part of an archive (the old format has none), which reads all values.
    """
    try:
        with path.open("rb") as file:
            return _read(file, resumed, checksums)
    except Unsafe as error:
        raise UserError(f"{path}: refused, this file does more than hold tensors ({error})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except _DAMAGED as error:
        reason = shown(str(error).partition("\n")[0] or type(error).__name__, 100)
        raise UserError(f"{path}: is truncated or damaged ({reason})") from error


def _read(file: BinaryIO, resumed: bool, checksums: bool) -> Any:
    start = file.read(len(_LEGACY_MAGIC))
    if not start:
        raise UserError("is empty")
    if start != _LEGACY_MAGIC and not start.startswith(ZIP_MAGIC):
        raise UserError("is not a checkpoint (neither safetensors nor written by torch.save)")
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if start == _LEGACY_MAGIC:
        content = _read_legacy(memory, resumed)
    else:
        content = _read_zip(file, memory, resumed, checksums)
    check_extent(content, len(memory))
    return content


def check_extent(content: Any, size: int) -> None:
    """Refuse what is, written out as a tree, deep, endless, or many times as large as its file of `size` bytes."""
    number, remaining, waiting = 0, _COPIES * size + _SPARE, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            remaining -= value.nbytes
        elif isinstance(value, (dict, list, tuple)):
            number += len(value)
            if depth == _DEEPEST or number > _MOST_OPERATIONS:
                raise Unsafe(f"its parts lie deeper than {_DEEPEST}, or refer to each other without end")
            waiting += ((part, depth + 1) for part in (value.values() if isinstance(value, dict) else value))
        if remaining < 0:
            raise Unsafe(f"its {size:,} bytes stand for tensors of many times that size")


# ------------------------------------------------------------------------------------------------------------ formats


def _read_zip(file: BinaryIO, memory: mmap.mmap, resumed: bool, checksums: bool) -> Any:
    entries = directory(file)
    names = [entry.filename for entry in entries]
    folder = next((name.removesuffix("data.pkl") for name in names if name.partition("/")[2] == "data.pkl"), None)
    if folder is None or f"{folder}constants.pkl" in names:
        found = "a zip archive" if folder is None else "a TorchScript program"
        raise UserError(f"is {found}, not a checkpoint written by torch.save")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise Unsafe("it is compressed or encrypted, which torch.save never does: it could fill any memory")
    if sum(entry.file_size for entry in entries) > len(memory):
        raise Unsafe("its parts overlap")
    if len({name.casefold() for name in names}) < len(names):
        raise Unsafe("two of its parts have one name")
    spans = {entry.filename: _span(memory, entry) for entry in entries}
    bytes_of = memoryview(memory)
    for entry in entries:
        if checksums or entry.filename == f"{folder}data.pkl":
            if zlib.crc32(bytes_of[spans[entry.filename]]) != entry.CRC:
                raise ValueError(f"{shown(entry.filename)}: wrong CRC-32")
    if bytes_of[spans.get(f"{folder}byteorder", slice(0))] == b"big":
        raise UserError("was written on a big-endian machine; save it again on another one")
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    found: dict[str, UntypedStorage] = {}

    def storage(key: str, size: int) -> UntypedStorage:
        span = spans[f"{folder}data/{key}"]
        if size > span.stop - span.start:
            raise EOFError(f"storage {shown(key)} is declared larger than the file has of it")
        if key not in found:
            part = whole[span]
            found[key] = part.clone() if resumed or span.start % _ALIGNMENT else part
        return found[key]

    return _Interpreter(storage, resumed).run(bytes_of[spans[f"{folder}data.pkl"]])[0]


def _span(memory: mmap.mmap, entry: zipfile.ZipInfo) -> slice:
    """Find the bytes of a part of an archive, whose own header must have the name that the directory says."""
    signature, name_length, extra_length = struct.unpack_from("<4s22xHH", memory, entry.header_offset)
    name = entry.header_offset + 30
    start = name + name_length + extra_length
    written = memory[name : name + name_length].decode("utf-8", "replace")
    if signature != ZIP_MAGIC or written != entry.orig_filename or start + entry.file_size > len(memory):
        raise ValueError(f"{shown(entry.filename)} is not where the directory says")
    return slice(start, start + entry.file_size)


def _read_legacy(memory: mmap.mmap, resumed: bool) -> Any:
    found: dict[str, UntypedStorage] = {}
    remaining = len(memory)

    def storage(key: str, size: int) -> UntypedStorage:
        nonlocal remaining
        if key not in found:
            remaining -= size
            if remaining < 0:
                raise EOFError("the end of its tensors is missing")
            found[key] = UntypedStorage(size, device="cpu")
        return found[key]

    interpreter, position, parts = _Interpreter(storage, resumed), 0, []
    for _ in range(_PARTS_OF_LEGACY):
        value, length = interpreter.run(memory[position : position + _LONGEST_PROGRAM])
        parts.append(value)
        position += length
    system, content, keys = parts[2:]
    if not system.get("little_endian", True):
        raise UserError("was written on a big-endian machine; save it again on another one")
    if sorted(map(str, keys)) != sorted(found):
        raise ValueError("the list of its storages does not fit its content")
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    for part in (found[str(key)] for key in keys):
        start = position + 8  # after the number of elements
        position = start + part.nbytes()
        if position > len(memory):
            raise EOFError("the end of its tensors is missing")
        part.copy_(whole[start:position])
    return content


# -------------------------------------------------------------------------------------------------------- interpreter


class _Foreign:
    """What every unknown name stands for, and what calling it returns: nothing can be done with it."""


@dataclass(frozen=True)
class _Storage:
    memory: UntypedStorage
    dtype: torch.dtype


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Rebuild a tensor from a part of a storage; `rest`: whether it has a gradient, hooks, [dtype], [what it is]."""
    if not isinstance(storage, _Storage):
        raise Unsafe("it holds a tensor without a storage")
    if any(isinstance(value, dict) and value for value in rest):
        raise Unsafe("it holds a tensor with hooks, or a conjugate one")
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
    if not len(size) == len(stride) <= _MOST_DIMENSIONS:
        raise Unsafe(f"it holds a tensor of {len(size)} sides and {len(stride)} strides")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise Unsafe("it holds a tensor whose shape makes no sense")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    available = storage.memory.nbytes() // dtype.itemsize
    if math.prod(size) > 0 and last >= available:
        raise Unsafe(f"it holds a tensor of shape {shown(str(tuple(size)))} in a storage of {available} elements")
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage.memory, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> Tensor:
    """Return the values of a parameter, without its hooks."""
    if not isinstance(data, Tensor):
        raise Unsafe("it holds a parameter without values")
    return data


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Rebuild a tensor of another class as a plain one."""
    return function(*arguments) if function is _tensor or function is _parameter else _FOREIGN


def _size(numbers: Iterable[int] = ()) -> torch.Size:
    if len(numbers) > _MOST_DIMENSIONS:
        raise Unsafe(f"it holds a shape of {len(numbers)} sides")
    return torch.Size(numbers)


def _ordered(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    return _filled({}, [part for key, value in pairs for part in (key, value)])


def _filled(target: Any, parts: list[Any]) -> Any:
    """Put keys and values, in turn, into a dict, whose keys cost no more than their length and do not collide."""
    if target is _FOREIGN:
        return target
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        is_plain = isinstance(key, (str, float, type(None), _Foreign))
        if not (is_plain or isinstance(key, int) and key.bit_length() <= 60) or not isinstance(target, dict):
            raise Unsafe(f"it holds a {type(key).__name__} as a key")
        target[key] = value
    return target


def _extended(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target += values
    elif target is not _FOREIGN:
        raise Unsafe(f"it appends to a {type(target).__name__}")


_FOREIGN = _Foreign()
_KINDS = {
    "Double": torch.double, "Float": torch.float, "Half": torch.half, "BFloat16": torch.bfloat16,
    "Long": torch.long, "Int": torch.int, "Short": torch.short, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.cfloat, "ComplexDouble": torch.cdouble,
}  # fmt: skip
_DTYPES = {f"torch {name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KNOWN = {
    **{name: dtype for name, dtype in _DTYPES.items() if not name.startswith(("torch q", "torch bits"))},
    **{f"torch {name}Storage": dtype for name, dtype in _KINDS.items()},
    **dict.fromkeys(["torch UntypedStorage", "torch.storage UntypedStorage"], torch.uint8),
    **{f"torch._utils _rebuild_tensor{version}": _tensor for version in ("", "_v2", "_v3")},
    **{f"torch._utils _rebuild_parameter{form}": _parameter for form in ("", "_with_state")},
    "torch._tensor _rebuild_from_type_v2": _of_type,
    "torch Size": _size,
    "collections OrderedDict": _ordered,
}
# Tensors of other kinds, and what only takes memory: better refused than missed.
_REFUSED = ("bytearray", "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_device_tensor_from_cpu_tensor")

_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_PUT, _GET = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")), frozenset(("GET", "BINGET", "LONG_BINGET"))


class _Interpreter:
    """Run pickles on a stack; `storage` finds the memory of a key, of at least so many bytes."""

    def __init__(self, storage: Callable[[str, int], UntypedStorage], resumed: bool) -> None:
        self._storage, self._resumed = storage, resumed
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._operations = self._calls = 0

    def run(self, program: bytes | memoryview) -> tuple[Any, int]:
        """Return what a program makes, and its length."""
        if len(program) > _LONGEST_PROGRAM:
            raise Unsafe(f"its structure alone has {len(program):,} bytes")
        memo: dict[int, Any] = {}
        for opcode, value, position in pickletools.genops(BytesIO(program)):
            name = opcode.name
            self._count(1)
            if name in _VALUES:
                self._stack.append(value)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name in _PUT:
                memo[len(memo) if name == "MEMOIZE" else value] = self._stack[-1]
            elif name in _GET:
                self._stack.append(memo[value])
            elif name == "STOP":
                return self._stack.pop(), position + 1
            elif name not in ("PROTO", "FRAME") and not self._gather(name):
                self._make(name, value)
        raise EOFError("its program has no end")

    def _count(self, operations: int) -> None:
        self._operations += operations
        if self._operations > _MOST_OPERATIONS:
            raise Unsafe(f"its structure takes more than {_MOST_OPERATIONS:,} operations")

    def _pop(self, number: int) -> list[Any]:
        """Take values from the top of the stack, the lowest first."""
        taken = self._stack[-number:]
        del self._stack[-number:]
        if len(taken) < number:
            raise IndexError("its program takes what is not there")
        return taken

    def _popped_to_mark(self) -> list[Any]:
        return self._pop(number) if (number := len(self._stack) - self._marks.pop()) > 0 else []

    def _gather(self, name: str) -> bool:
        """Move values between stack and containers; return whether the operation is one of these."""
        if name == "MARK":
            self._marks.append(len(self._stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self._stack.append(tuple(self._pop(int(name[-1]))))
        elif name in ("TUPLE", "LIST"):
            values = self._popped_to_mark()
            self._stack.append(tuple(values) if name == "TUPLE" else values)
        elif name == "DICT":
            self._stack.append(_filled({}, self._popped_to_mark()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = self._pop(1) if name == "APPEND" else self._popped_to_mark()
            _extended(self._stack[-1], values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if name == "SETITEM" else self._popped_to_mark()
            _filled(self._stack[-1], values)
        elif name == "DUP":
            self._stack.append(self._stack[-1])
        elif name == "POP":
            self._pop(1)
        elif name == "POP_MARK":
            self._popped_to_mark()
        else:
            return False
        return True

    def _make(self, name: str, value: Any) -> None:
        """Look up a name, call what it stands for, or find a storage."""
        if name == "GLOBAL":
            made = self._named(value)
        elif name == "STACK_GLOBAL":
            made = self._named(" ".join(self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            made = self._called(*self._pop(2))
        elif name == "BUILD":
            made = self._pop(2)[0]  # attributes are left out
            if isinstance(made, FunctionType):
                raise Unsafe("it tries to change a function")
        elif name == "BINPERSID":
            made = self._found(*self._pop(1))
        elif name in ("EMPTY_SET", "FROZENSET", "NEWOBJ_EX") and not self._resumed:
            if name != "EMPTY_SET":
                self._pop(3) if name == "NEWOBJ_EX" else self._popped_to_mark()
            made = _FOREIGN
        else:
            raise Unsafe(f"it uses {name}")
        self._stack.append(made)

    def _named(self, name: str) -> Any:
        if name in _KNOWN:
            return _KNOWN[name]
        if self._resumed or name.rpartition(" ")[2] in _REFUSED:
            raise Unsafe(f"it uses {shown(name.replace(' ', '.'))}")
        return _FOREIGN

    def _called(self, function: Any, arguments: Any) -> Any:
        if function is _FOREIGN:
            return _FOREIGN
        if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
            raise Unsafe(f"it calls a {type(function).__name__}")
        self._calls += 1
        if self._calls > _MOST_CALLS:
            raise Unsafe(f"it holds more than {_MOST_CALLS:,} tensors")
        self._count(sum(len(argument) for argument in arguments if isinstance(argument, (list, tuple))))
        return function(*arguments)

    def _found(self, reference: Any) -> _Storage:
        """Return the storage of a reference ("storage", kind, key, device, elements[, view])."""
        _, dtype, key, _, count, *view = reference
        if not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0 or not isinstance(key, (str, int)):
            raise Unsafe("it declares a storage that makes no sense")
        memory = self._storage(str(key), count * dtype.itemsize)
        if view and view[0] is not None:
            _, offset, length = view[0]
            if min(offset, length) < 0 or offset + length > count:
                raise Unsafe("it declares a view beyond its storage")
            memory = memory[offset * dtype.itemsize : (offset + length) * dtype.itemsize]
        return _Storage(memory, dtype)
