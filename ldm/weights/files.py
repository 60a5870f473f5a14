"""Files of weights: one door for reading them, written completely or not at all, frozen parts stored once.

The entry `frozen` of a checkpoint without its frozen parts names the file in the same folder that has them:
    {"sha256": ..., "names": {name in the state dict: name in the file}}
A safetensors file written here has in its metadata, under `sha256`, the SHA-256 of itself with zeros in that place.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import distributed
from ldm.errors import UserError, shown
from ldm.weights.audit import check_complete, check_extent, read_torch
from ldm.weights.pickles import Unsafe
from ldm.writing import give_usual_rights

Content = TypeVar("Content")

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
FROZEN = "frozen"
_SHA256 = re.compile("[0-9a-f]{64}")
_HASH, _NO_HASH = "sha256", "0" * 64
_ALMOST_NOTHING = 1 << 20  # bytes that a full disk may have left
_LONGEST_HEADER = 1 << 24  # bytes of a safetensors file before its tensors
_log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------ reading


def inspect(path: Path) -> None:
    """Check that a file is a complete checkpoint; nothing is run or allocated. UserError if not.

    Values are not read: a full disk or a kill leaves a file that is too short or without its directory, and reading
    the values back would be answered from the page cache.
    """
    if is_safetensors(path):
        safetensors_metadata(path)
    else:
        check_complete(path)


def read_file(path: Path, resumed: bool = False) -> Any:
    """Return the content of a file with its frozen parts, on the CPU, its values compared with their checksums.

    `resumed` refuses parts of other classes, which weights to start from may have. UserError for any other file.
    """
    if is_safetensors(path):
        return read_safetensors(path)
    content = read_torch(path, resumed)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        restore_frozen(content, path)
    return content


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint to resume from with its frozen parts, on the CPU. UserError if it is none."""
    content = read_file(path, resumed=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: holds no state dict")
    return content


def with_earlier(path: Path) -> list[Path]:
    """List a checkpoint and, if it is the newest of its run, those beside it that were saved before, newest first."""
    earlier = [path.with_name(PREVIOUS)] if path.name == LAST else []
    if path.name in (LAST, PREVIOUS):
        earlier += sorted(path.parent.glob("step=*.ckpt"), reverse=True)
    return [path, *(file for file in earlier if file.is_file())]


def first_good(candidates: Iterable[Path], read: Callable[[Path], Content]) -> tuple[Path, Content]:
    """Return the first file that can be read, and what was read; one warning says why it is not the first of all.

    UserError, that of the first file, if none can be read.
    """
    problems: list[str] = []
    for candidate in candidates:
        try:
            if not candidate.is_file():  # a FIFO would be waited for
                raise UserError(f"{candidate}: is not a file")
            content = read(candidate)
        except UserError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{candidate}: cannot be read: {error.strerror or error}")
        else:
            if problems and distributed.rank() == 0:
                _log.warning("%s; using %s, which was saved before it", problems[0], candidate.name)
            return candidate, content
    raise UserError(problems[0] + ("; no other checkpoint beside it is good" if problems[1:] else ""))


# -------------------------------------------------------------------------------------------------------- safetensors


def is_safetensors(path: Path) -> bool:
    """Return whether a file has the format of safetensors, or a name that says so."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors. UserError for a damaged file."""
    with path.open("rb") as file:
        length = _header_length(file)
    if length > min(_LONGEST_HEADER, path.stat().st_size - 8):
        raise UserError(f"{path}: is truncated or not a safetensors file (a header of {length:,} bytes)")
    try:
        with safe_open(path, "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        reason = shown(str(error), 100)
        raise UserError(f"{path}: is truncated or not a safetensors file ({reason})") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU. UserError for a damaged file."""
    expected = safetensors_metadata(path).get(_HASH)
    if expected is not None:
        with path.open("rb") as file:
            if _hash_of(file, expected) != expected:
                raise UserError(f"{path}: is damaged, it has another SHA-256 than when it was written; copy it again")
    return load_file(path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write contiguous tensors and texts, and the hash of the tensors. OSError if that fails."""
    try:
        save_file(dict(tensors), path, {**texts, _HASH: _NO_HASH})
    except SafetensorError as error:
        raise failed_write(path, error) from error
    give_usual_rights(path)
    with path.open("rb+") as file:
        digest = _hash_of(file, _NO_HASH)
        file.seek(0)
        file.seek(file.read(8 + _header_length(file)).index(_field(_NO_HASH)))
        file.write(_field(digest))
        file.flush()
        os.fsync(file.fileno())


def _field(digest: str) -> bytes:
    """Return the hash as it stands in the header; within a text of the user quotes are escaped."""
    return f'"{_HASH}":"{digest}"'.encode()


def _header_length(file: BinaryIO) -> int:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    file.seek(0)
    return length


def _hash_of(file: BinaryIO, digest: str) -> str:
    """Return the SHA-256 of a file in which `digest` stands for that of itself."""
    header = file.read(8 + _header_length(file))
    computed = hashlib.sha256(header.replace(_field(digest), _field(_NO_HASH), 1))
    while block := file.read(1 << 20):
        computed.update(block)
    return computed.hexdigest()


# ------------------------------------------------------------------------------------------------------------ writing


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint to the disk. OSError if that fails."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer, after a short write
            raise failed_write(path, error) from error
        file.flush()
        os.fsync(file.fileno())


def failed_write(path: Path, error: BaseException) -> OSError:
    """Return why a library could not write a file: what the system said, or that the disk is full if it is."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__context__
    if shutil.disk_usage(path.parent).free < _ALMOST_NOTHING:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return OSError(f"{path}: {shown(str(error), 100)}")


def publish(temporary: Path, path: Path, previous: Path | None = None) -> None:
    """Check a written file and move it to `path`; the file there before is kept as `previous`.

    At every moment `path` or `previous` is a complete file. After an OSError or UserError nothing has changed.
    """
    inspect(temporary)
    if previous is not None and path.exists():
        link(path, previous)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def link(path: Path, name: Path) -> None:
    """Give a file a second name; files here are never written in place, so a link is a copy."""
    aside = name.with_suffix(".link")
    aside.unlink(missing_ok=True)
    try:
        aside.hardlink_to(path)
    except OSError:  # a file system without links
        shutil.copyfile(path, aside)
    os.replace(aside, name)


def _sync_folder(folder: Path) -> None:
    """Make renames survive a loss of power, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------- frozen parts


class FrozenParts:
    """Store tensors that training does not change in one file of a folder instead of in each checkpoint there."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder, self._names = folder, tuple(names)
        self._seen: tuple[tuple[int, int], ...] | None = None
        self._entry: dict[str, Any] = {}

    def take_out(self, content: dict[str, Any]) -> None:
        """Move the frozen tensors of a checkpoint to the file, which is written at first. Raises OSError."""
        state = content["state_dict"]
        tensors = {name: state[name] for name in self._names if name in state}
        if not tensors:
            return
        # torch raises the version of a tensor at every write in place: until then hashing once is enough.
        seen = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors.values())
        if seen != self._seen or not frozen_file(self._folder, self._entry).exists():
            self._entry, self._seen = _store(self._folder, tensors), seen
        content["state_dict"] = {name: value for name, value in state.items() if name not in tensors}
        content[FROZEN] = self._entry


def _store(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    first: dict[tuple[Any, ...], str] = {}  # one tensor may have two names
    names = {
        name: first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        for name, tensor in tensors.items()
    }
    temporary = folder / "frozen.tmp"
    temporary.unlink(missing_ok=True)  # it may be a link
    kept = {name: tensors[name].detach().cpu().clone().contiguous() for name in dict.fromkeys(names.values())}
    try:
        save_file(kept, temporary)
    except SafetensorError as error:
        raise failed_write(temporary, error) from error
    give_usual_rights(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
        entry = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "names": names}
    os.replace(temporary, frozen_file(folder, entry))
    _sync_folder(folder)
    return entry


def frozen_file(folder: Path, entry: dict[str, Any]) -> Path:
    """Return the path of the file that an entry `frozen` refers to."""
    return folder / f"frozen-{str(entry['sha256'])[:16]}.safetensors"


def restore_frozen(content: dict[str, Any], path: Path) -> None:
    """Put the frozen parts back into the checkpoint read from `path`. UserError if they are missing or altered."""
    entry = content.pop(FROZEN, None)
    if entry is None:
        return
    names = entry.get("names") if isinstance(entry, dict) else None
    if not (
        isinstance(names, dict)
        and all(isinstance(stored, str) for stored in names.values())
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"])
    ):
        raise UserError(f"{path}: its reference to frozen parts makes no sense")
    file = frozen_file(path.parent, entry)
    if not file.is_file():
        raise UserError(f"{path}: its frozen parts are missing; copy {file.name} from its run folder beside it")
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
            raise UserError(f"{path}: its frozen parts, {file.name}, were altered; copy that file again")
    tensors = read_safetensors(file)
    if missing := set(names.values()) - tensors.keys():
        raise UserError(f"{path}: its frozen parts, {file.name}, lack {len(missing)} tensors; copy that file again")
    content["state_dict"] |= {name: tensors[stored] for name, stored in names.items()}
    try:
        check_extent(content, path.stat().st_size + file.stat().st_size)
    except Unsafe as error:
        raise UserError(f"{path}: refused ({error})") from error
