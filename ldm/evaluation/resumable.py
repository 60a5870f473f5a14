"""Long work in parts: shared out among ranks, each part kept in a file, so that none is done twice after a stop.

    FOLDER/settings.json         what the work is; a folder that holds other work is refused
    FOLDER/parts/000000.safetensors
All ranks must see the same folder. A part is a function of its positions alone, so their number changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import distributed
from ldm.errors import UserError

Columns = dict[str, Tensor]


class Parts:
    """Divide positions 0..count - 1 into parts of `size`.

    UserError if the folder holds work with other settings, naming what differs, or cannot be written.
    """

    def __init__(self, folder: Path, count: int, size: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.count = folder, count
        self.size = self._claim(json.loads(json.dumps({**settings, "part_size": size})))

    def run(self, compute: Callable[[range], Columns]) -> Columns:
        """Do what is not done, wait for the other ranks, and give the columns of all positions, in order.

        compute: positions -> tensors by name, whose first side counts the positions or some of them.
        """
        rank, world = distributed.rank(), distributed.world_size()
        paths = []
        for number, positions in enumerate(self._ranges()):
            path = self.folder / "parts" / f"{number:06}.safetensors"
            paths.append(path)
            if number % world == rank and _read(path) is None:
                _write(path, compute(positions))
        wait_for_all()
        done = [load_file(path) for path in paths]
        return {name: torch.cat([part[name] for part in done]) for name in done[0]}

    def _ranges(self) -> Iterator[range]:
        for first in range(0, self.count, self.size):
            yield range(first, min(first + self.size, self.count))

    def _claim(self, settings: dict[str, Any]) -> int:
        """Note what is done here, or find it noted; return the size of the parts, that of the beginning."""
        path = self.folder / "settings.json"
        if distributed.rank() == 0 and not path.is_file():
            try:
                (self.folder / "parts").mkdir(parents=True, exist_ok=True)
                _replace(path, json.dumps(settings, indent=2).encode())
            except OSError as error:
                raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error
        wait_for_all()
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: is damaged ({error}); remove {self.folder} to begin anew") from error
        different = differences({**noted, "part_size": 0}, {**settings, "part_size": 0})
        if different:
            raise UserError(
                f"{self.folder}: holds another evaluation, nothing was changed; it differs in "
                f"{'; '.join(different)}; choose another folder"
            )
        return noted["part_size"]


def differences(first: Any, second: Any, place: str = "") -> list[str]:
    """List where two trees of plain values differ, as `place: a, b`."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        inner = ((first.get(key), second.get(key), f"{place}.{key}" if place else str(key)) for key in keys)
        return [line for entry in inner for line in differences(*entry)]
    return [] if first == second else [f"{place}: {_short(first)}, {_short(second)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-24:]}"


def wait_for_all() -> None:
    """Wait until all ranks are here."""
    if distributed.world_size() > 1:
        torch.distributed.barrier()


def _read(path: Path) -> Columns | None:
    """Return what a part holds, None where it is absent or was cut off."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _write(path: Path, columns: Columns) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in columns.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
