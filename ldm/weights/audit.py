"""Read a file of torch.save, in either of its formats, on our own: see `ldm.weights.pickles`.

Torch's own reader is not asked, since two readers may find two programs in one archive. Tensors are views of the mapped
file and lie within it; what the content takes when it is written out is bounded by the size of the file.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, UntypedStorage

from ldm.errors import UserError, shown
from ldm.weights.archives import DAMAGED, ZIP_MAGIC, directory
from ldm.weights.kinds import format_of
from ldm.weights.pickles import LONGEST_PROGRAM, MOST_OPERATIONS, Interpreter, Unsafe

_DEEPEST = 100
_SPARE = 1 << 26  # bytes that a small file may hold when its tensors are written out
_COPIES = 4  # times its size that a large one may: several names share a tensor
_ALIGNMENT = 16  # bytes of the widest number
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # after the protocol
_PARTS_OF_LEGACY = 5  # magic number, protocol, system, content, keys of the storages in their order
_DAMAGED = (*DAMAGED, ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, struct.error)


def read_torch(path: Path, resumed: bool = False, checksums: bool = True) -> Any:
    """Return the content of a file of torch.save (zip or old format) on the CPU, its tensors mapped from the file.

    UserError for a file of another format, a damaged one, and one that asks for more than tensors and plain values.

    Args:
        path: A file; it is opened once, and may be replaced while its tensors are in use.
        resumed: Refuse other classes by name instead of ignoring them, and copy the tensors into memory.
        checksums: Compare the CRC-32 of every part of an archive (the old format has none), which reads all values.
    """
    with _in_one_line(path), path.open("rb") as file:
        return _read(file, resumed, checksums)


def check_complete(path: Path) -> None:
    """Check that a file of torch.save is there to its end, and its structure as it was written. UserError if not.

    Neither values nor what the structure means are looked at, so that it takes no time; the old format, which ends
    without a directory, has to be read.
    """
    with _in_one_line(path), path.open("rb") as file:
        memory, is_legacy = _mapped(file)
        if is_legacy:
            _read_legacy(memory, resumed=False)
        else:
            _parts(file, memory, checksums=False)


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except Unsafe as error:
        raise UserError(f"{path}: refused, this file does more than hold tensors ({error})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except _DAMAGED as error:
        reason = shown(str(error).partition("\n")[0] or type(error).__name__, 100)
        raise UserError(f"{path}: is truncated or damaged ({reason})") from error


def _read(file: BinaryIO, resumed: bool, checksums: bool) -> Any:
    memory, is_legacy = _mapped(file)
    content = _read_legacy(memory, resumed) if is_legacy else _read_zip(file, memory, resumed, checksums)
    check_extent(content, len(memory))
    return content


def _mapped(file: BinaryIO) -> tuple[mmap.mmap, bool]:
    """Map a file into memory; whether it is of the old format. UserError for any other than the two."""
    start = file.read(32)
    is_legacy = start.startswith(b"\x80") and _LEGACY_MAGIC in start
    if not start:
        raise UserError("is empty")
    if not is_legacy and not start.startswith(ZIP_MAGIC):
        raise UserError(f"is not a checkpoint: it {format_of(start)}")
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), is_legacy


def check_extent(content: Any, size: int) -> None:
    """Refuse what is, written out as a tree, deep, endless, or many times as large as its file of `size` bytes."""
    parts, remaining, waiting = min(_COPIES * size, MOST_OPERATIONS), _COPIES * size + _SPARE, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            remaining -= value.nbytes
        elif isinstance(value, (dict, list, tuple)):
            parts -= len(value)
            if depth == _DEEPEST or parts < 0:
                raise Unsafe(f"its parts lie deeper than {_DEEPEST}, or refer to each other without end")
            waiting += ((part, depth + 1) for part in (value.values() if isinstance(value, dict) else value))
        if remaining < 0:
            raise Unsafe(f"its {size:,} bytes stand for tensors of many times that size")


# ------------------------------------------------------------------------------------------------------------ formats


def _parts(file: BinaryIO, memory: mmap.mmap, checksums: bool) -> tuple[str, dict[str, slice]]:
    """Return the folder in an archive and the places of its parts by name, the structure compared with its CRC-32."""
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
    return folder, spans


def _read_zip(file: BinaryIO, memory: mmap.mmap, resumed: bool, checksums: bool) -> Any:
    folder, spans = _parts(file, memory, checksums)
    bytes_of = memoryview(memory)
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

    program = bytes_of[spans[f"{folder}data.pkl"]]
    if len(program) > LONGEST_PROGRAM:
        raise Unsafe(f"its structure alone has {len(program):,} bytes")
    return Interpreter(storage, refuse_foreign=resumed).run(program)[0]


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

    interpreter, position, parts = Interpreter(storage, refuse_foreign=resumed), 0, []
    for _ in range(_PARTS_OF_LEGACY):
        value, length = interpreter.run(memory[position : position + LONGEST_PROGRAM])
        parts.append(value)
        position += length
    system, content, keys = parts[2:]
    if not system.get("little_endian", True):
        raise UserError("was written on a big-endian machine; save it again on another one")
    if not all(isinstance(key, (str, int)) for key in keys) or sorted(map(str, keys)) != sorted(found):
        raise ValueError("the list of its storages does not fit its content")
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    for part in (found[str(key)] for key in keys):
        start = position + 8  # after the number of elements
        position = start + part.nbytes()
        if position > len(memory):
            raise EOFError("the end of its tensors is missing")
        part.copy_(whole[start:position])
    return content
