"""An interpreter for the pickles in files of torch.save: nothing that they name is imported, called or run.

A pickle is a program for a small stack machine that looks up names and calls them. Here that machine knows lists,
dicts, plain values and the few functions that rebuild tensors. Every other name in a file to take weights from stands
for one inert object, so that what Lightning pickled beside its tensors can be read and `os.system` does nothing; in a
checkpoint to resume from it is refused. Operations and calls are counted, and nothing costs more than they do.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from ldm.errors import shown

MOST_OPERATIONS = 1 << 21  # a tensor of a state dict takes about 80
LONGEST_PROGRAM = 1 << 25  # bytes
_OF_A_CALL = 15  # operations that the time and memory of a call amount to
_MOST_SIDES = 64  # of a tensor
_LONGEST_NAME = 1000


class Unsafe(Exception):
    """A file asks for what reading tensors does not need."""


class _Foreign:
    """What every unknown name stands for, and what calling it returns: nothing can be done with it."""


_FOREIGN = _Foreign()


# --------------------------------------------------------------------------------------------------- what is rebuilt


@dataclass(frozen=True)
class _Storage:
    memory: UntypedStorage
    dtype: torch.dtype


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> Tensor:
    """Rebuild a tensor from a part of a storage; `rest`: whether it has a gradient, hooks, [dtype], [what it is]."""
    if not isinstance(storage, _Storage):
        raise Unsafe("it holds a tensor without a storage")
    if any(isinstance(value, dict) and value for value in rest):
        raise Unsafe("it holds a tensor with hooks, or a conjugate one")
    if not len(size) == len(stride) <= _MOST_SIDES:
        raise Unsafe(f"it holds a tensor of {len(size)} sides and {len(stride)} strides")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise Unsafe("it holds a tensor whose shape makes no sense")
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
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


def _of_class(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Rebuild a tensor of a class of its own as a plain one."""
    return function(*arguments) if function in (_tensor, _parameter) else _FOREIGN


def _size(numbers: Sequence[int] = ()) -> torch.Size:
    if len(numbers) > _MOST_SIDES:
        raise Unsafe(f"it holds a shape of {len(numbers)} sides")
    return torch.Size(numbers)


def _ordered(pairs: Sequence[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    if not isinstance(pairs, (list, tuple)):  # whose length was counted
        raise Unsafe(f"it holds an OrderedDict of a {type(pairs).__name__}")
    target: dict[Any, Any] = {}
    _fill(target, pairs)
    return target


def _fill(target: Any, pairs: Sequence[tuple[Any, Any]], refuse_foreign: bool = True) -> None:
    """Put pairs of a key and a value into a dict. Keys are plain: others may hash slowly, deeply, or all alike."""
    if target is _FOREIGN:
        return
    if not isinstance(target, dict):
        raise Unsafe(f"it sets an item of a {type(target).__name__}")
    for key, value in pairs:
        is_plain = isinstance(key, (str, float, type(None), _Foreign))
        if not is_plain and not (isinstance(key, int) and key.bit_length() <= 60):
            if refuse_foreign:
                raise Unsafe(f"it holds a {type(key).__name__} as a key")
            key = _FOREIGN
        target[key] = value


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "Double": torch.double, "Float": torch.float, "Half": torch.half, "BFloat16": torch.bfloat16,
    "Long": torch.long, "Int": torch.int, "Short": torch.short, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.cfloat, "ComplexDouble": torch.cdouble,
}  # fmt: skip
_KNOWN = {
    **{f"torch {name}": dtype for name, dtype in _DTYPES.items() if not name.startswith(("q", "bits"))},
    **{f"torch {name}Storage": dtype for name, dtype in _STORAGES.items()},
    **dict.fromkeys(["torch UntypedStorage", "torch.storage UntypedStorage"], torch.uint8),
    **{f"torch._utils _rebuild_tensor{version}": _tensor for version in ("", "_v2", "_v3")},
    **{f"torch._utils _rebuild_parameter{form}": _parameter for form in ("", "_with_state")},
    "torch._tensor _rebuild_from_type_v2": _of_class,
    "torch Size": _size,
    "collections OrderedDict": _ordered,
}
# Tensors of other kinds, and what only takes memory: refused in every file, so that nothing is missed in silence.
_REFUSED = ("bytearray", "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_device_tensor_from_cpu_tensor")


# ------------------------------------------------------------------------------------------------------- the machine


class Interpreter:
    """Run pickles.

    Args:
        storage: From the key of a storage and its declared number of bytes to its memory.
        refuse_foreign: Whether names that have nothing to do with tensors are refused rather than inert.
    """

    def __init__(self, storage: Callable[[str, int], UntypedStorage], refuse_foreign: bool) -> None:
        self._storage, self._refuse_foreign = storage, refuse_foreign
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._operations = 0

    def run(self, program: bytes | memoryview) -> tuple[Any, int]:
        """Return what a program makes, and its length. Unsafe, or any error that malformed values lead to."""
        self._memo.clear()
        file = BytesIO(program)
        while code := file.read(1):
            self._count(1)
            name, argument, operation = _OPCODES[code]
            if operation is None:
                raise Unsafe(f"it uses {name}")
            operation(self, argument(file) if argument else None)
            if code == pickle.STOP:
                return self._stack.pop(), file.tell()
        raise EOFError("its structure breaks off")

    def _count(self, operations: int) -> None:
        self._operations += operations
        if self._operations > MOST_OPERATIONS:
            raise Unsafe(f"its structure takes more than {MOST_OPERATIONS:,} operations; give safetensors")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, number: int | None = None) -> list[Any]:
        """Take so many values from the top of the stack, None: all above the last mark; the lowest comes first."""
        if number is None:
            first = self._marks.pop()
        else:
            first = len(self._stack) - number
            if first < (self._marks[-1] if self._marks else 0):
                raise LookupError("its program takes what is not there")
        taken = self._stack[first:]
        del self._stack[first:]
        return taken

    def _remember(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target += values
        elif target is not _FOREIGN:
            raise Unsafe(f"it appends to a {type(target).__name__}")

    def _fill(self, values: list[Any]) -> None:
        _fill(self._stack[-1], list(zip(values[::2], values[1::2], strict=True)), self._refuse_foreign)

    def _build(self) -> None:
        """Leave out the attributes of the object below them."""
        self._pop(1)
        if isinstance(self._stack[-1], FunctionType):
            raise Unsafe("it tries to change a function")

    def _composed_name(self, module: str, name: str) -> None:
        if len(module) + len(name) > _LONGEST_NAME:  # to compose it takes longer than an operation
            raise Unsafe(f"it uses {shown(module)}.{shown(name)}")
        self._name(f"{module} {name}")

    def _name(self, name: str) -> None:
        if name not in _KNOWN and (self._refuse_foreign or name.rpartition(" ")[2] in _REFUSED):
            raise Unsafe(f"it uses {shown(name.replace(' ', '.'))}")
        self._push(_KNOWN.get(name, _FOREIGN))

    def _call(self, function: Any, arguments: Any) -> None:
        if function is not _FOREIGN:
            if not isinstance(function, FunctionType) or not isinstance(arguments, tuple):
                raise Unsafe(f"it calls a {type(function).__name__}")
            self._count(_OF_A_CALL + sum(len(value) for value in arguments if isinstance(value, (list, tuple))))
            function = function(*arguments)
        self._push(function)

    def _find(self, reference: Any) -> None:
        """Push the storage of a reference ("storage", kind, key, device, elements[, view])."""
        _, dtype, key, _, count, *view = reference
        if not isinstance(dtype, torch.dtype) or not isinstance(key, (str, int)) or type(count) is not int or count < 0:
            raise Unsafe("it declares a storage that makes no sense")
        self._count(_OF_A_CALL)
        memory = self._storage(str(key), count * dtype.itemsize)
        if view and view[0] is not None:
            _, offset, length = view[0]
            if min(offset, length) < 0 or offset + length > count:
                raise Unsafe("it declares a view beyond its storage")
            memory = memory[offset * dtype.itemsize : (offset + length) * dtype.itemsize]
        self._push(_Storage(memory, dtype))


_VALUES = (
    "INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
_OPERATIONS: dict[str, Callable[[Interpreter, Any], None]] = {
    **dict.fromkeys(_VALUES.split(), Interpreter._push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, value: None),
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_SET": lambda machine, _: machine._name("builtins set"),
    "FROZENSET": lambda machine, _: (machine._pop(), machine._name("builtins frozenset")),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Interpreter._remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, place: machine._push(machine._memo[place])),
    "MARK": lambda machine, _: machine._marks.append(len(machine._stack)),
    "POP": lambda machine, _: machine._pop(1),
    "DUP": lambda machine, _: machine._push(machine._stack[-1]),
    "TUPLE1": lambda machine, _: machine._push(tuple(machine._pop(1))),
    "TUPLE2": lambda machine, _: machine._push(tuple(machine._pop(2))),
    "TUPLE3": lambda machine, _: machine._push(tuple(machine._pop(3))),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._pop())),
    "LIST": lambda machine, _: machine._push(machine._pop()),
    "APPEND": lambda machine, _: machine._extend(machine._pop(1)),
    "APPENDS": lambda machine, _: machine._extend(machine._pop()),
    "ADDITEMS": lambda machine, _: machine._extend(machine._pop()),
    "SETITEM": lambda machine, _: machine._fill(machine._pop(2)),
    "SETITEMS": lambda machine, _: machine._fill(machine._pop()),
    "GLOBAL": Interpreter._name,
    "STACK_GLOBAL": lambda machine, _: machine._composed_name(*machine._pop(2)),
    "REDUCE": lambda machine, _: machine._call(*machine._pop(2)),
    "NEWOBJ": lambda machine, _: machine._call(*machine._pop(2)),
    "NEWOBJ_EX": lambda machine, _: machine._call(*machine._pop(3)[:2]),
    "BUILD": lambda machine, _: machine._build(),
    "BINPERSID": lambda machine, _: machine._find(*machine._pop(1)),
}
# By their byte: name, what reads the argument (None: there is none), and what to do (None: no tensor needs it).
_OPCODES = {
    opcode.code.encode("latin-1"): (opcode.name, opcode.arg and opcode.arg.reader, _OPERATIONS.get(opcode.name))
    for opcode in pickletools.opcodes
}
