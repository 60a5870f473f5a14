"""Files of weights: checked before they are read, written completely or not at all, frozen parts stored once.

The entry `frozen` of a checkpoint without its frozen parts names the file in the same folder that has them:
    {"sha256": ..., "names": {name in the state dict: name in the file}}
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldm.errors import UserError
from ldm.weights.audit import UnsafeCheckpoint, audit

FROZEN = "frozen"
_SHA256 = re.compile("[0-9a-f]{64}")
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


# ------------------------------------------------------------------------------------------------------------ reading


def inspect(path: Path) -> None:
    """Check that a file is a complete checkpoint of torch.save; nothing is run or allocated. UserError if not.

    Values are not read: a full disk or a kill leaves a file that is too short or without its directory, and reading
    the values back would be answered from the page cache.
    """
    _check_container(path)
    try:
        audit(path)
    except UnsafeCheckpoint as error:
        raise UserError(f"{path}: refused, this file does more than hold tensors ({error})") from error
    except ValueError as error:
        raise UserError(f"{path}: is truncated or damaged ({error})") from error


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint of ours with its frozen parts, on the CPU. UserError if it is none."""
    inspect(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a file that is none of ours
        raise UserError(f"{path}: cannot be resumed from: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: holds no state dict")
    restore_frozen(content, path)
    return content


def _check_container(path: Path) -> None:
    """Check that a file has one of the two formats of torch.save. A TorchScript archive, a program, has not."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    if start == _LEGACY_MAGIC:
        return
    if not start.startswith(b"PK\x03\x04"):
        found = "is empty" if not start else "is not a checkpoint (neither safetensors nor written by torch.save)"
        raise UserError(f"{path}: {found}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is truncated; its end is missing, copy it again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is truncated or damaged ({error})") from error
    if "constants.pkl" in names:
        raise UserError(f"{path}: is a TorchScript program, not a checkpoint")
    if "data.pkl" not in names:
        raise UserError(f"{path}: is a zip archive, but not a checkpoint written by torch.save")


# ------------------------------------------------------------------------------------------------------------ writing


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint to the disk. OSError if that fails."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer, after a short write
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
        file.flush()
        os.fsync(file.fileno())


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
    kept = {name: tensors[name].detach().cpu().clone().contiguous() for name in dict.fromkeys(names.values())}
    try:
        save_file(kept, temporary)
    except SafetensorError as error:
        raise OSError(f"{temporary}: {error}") from error
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
    if not (
        isinstance(entry, dict) and _SHA256.fullmatch(str(entry.get("sha256"))) and isinstance(entry.get("names"), dict)
    ):
        raise UserError(f"{path}: its reference to frozen parts makes no sense")
    file = frozen_file(path.parent, entry)
    if not file.is_file():
        raise UserError(f"{path}: its frozen parts are missing; copy {file.name} from its run folder beside it")
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
            raise UserError(f"{path}: its frozen parts, {file.name}, were altered; copy that file again")
    tensors = load_file(file)
    if missing := set(entry["names"].values()) - tensors.keys():
        raise UserError(f"{path}: its frozen parts, {file.name}, lack {len(missing)} tensors; copy that file again")
    content["state_dict"] |= {name: tensors[stored] for name, stored in entry["names"].items()}
