"""Long work in parts: divided among ranks, each part kept in a file, so that none is done twice after a stop.

    FOLDER/settings.json         what the work is; a folder of other work is refused
    FOLDER/parts/000000.safetensors
All ranks must see the same folder. A part is a function of its positions alone: the number of ranks changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import distributed
from ldm.errors import UserError
from ldm.writing import give_usual_rights

Columns = dict[str, Tensor]


class ResumableMap:
    """A function of positions 0..count - 1, computed in parts of `size` positions.

    UserError if the folder cannot be written, or is of other settings, naming those that differ.
    """

    def __init__(self, folder: Path, count: int, size: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.count = folder, count
        self.size = self._claim(json.loads(json.dumps({**settings, "part_size": size})))

    def run(self, compute: Callable[[range], Columns]) -> Columns:
        """Compute the absent parts, wait for the other ranks, and return the columns of all positions, in order.

        compute: positions -> tensors by name, whose first side counts the positions or some of them.
        """
        rank, world = distributed.rank(), distributed.world_size()
        paths = []
        for number, first in enumerate(range(0, self.count, self.size)):
            paths.append(self.folder / "parts" / f"{number:06}.safetensors")
            if number % world == rank and not _is_complete(paths[-1]):
                columns = compute(range(first, min(first + self.size, self.count)))
                columns = {name: tensor.cpu().contiguous() for name, tensor in columns.items()}
                _replace(paths[-1], lambda path, columns=columns: save_file(columns, path))
        wait_for_all()
        parts = [load_file(path) for path in paths]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _claim(self, settings: dict[str, Any]) -> int:
        """Write the settings, or compare them with those written before; return the size of the parts as begun."""
        path = self.folder / "settings.json"
        if distributed.rank() == 0 and not path.is_file():
            text = json.dumps(settings, indent=2)
            _replace(path, lambda temporary: temporary.write_text(text))
        wait_for_all()
        try:
            written = with_current_names(json.loads(path.read_text(encoding="utf-8")))
            if type(written.get("part_size")) is not int or written["part_size"] < 1:
                raise ValueError("part_size is no number of samples")
        except (ValueError, AttributeError, RecursionError, OSError) as error:
            raise UserError(f"{path}: is damaged ({error}); remove {self.folder} to begin anew") from error
        different = differences({**written, "part_size": 0}, {**settings, "part_size": 0})
        if different:
            raise UserError(
                f"{self.folder}: holds another evaluation, nothing was changed; it differs in "
                f"{'; '.join(different)}; choose another folder"
            )
        return written["part_size"]


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings or a result with the names of today; images were called pictures before."""
    renamed = {"images" if key == "pictures" else key: value for key, value in settings.items()}
    return {**renamed, "kind": "images"} if renamed.get("kind") == "pictures" else renamed


def differences(first: Any, second: Any, place: str = "") -> list[str]:
    """List where two trees of plain values differ, as `place: a, b`."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        inner = ((first.get(key), second.get(key), f"{place}.{key}" if place else str(key)) for key in keys)
        return [line for entry in inner for line in differences(*entry)]
    return [] if first == second else [f"{place}: {_shortened(first)}, {_shortened(second)}"]


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-24:]}"


def wait_for_all() -> None:
    """Wait until all ranks are here."""
    if distributed.world_size() > 1:
        torch.distributed.barrier()


def _is_complete(path: Path) -> bool:
    try:
        return bool(load_file(path))
    except (OSError, SafetensorError):  # absent or cut off
        return False


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all. UserError if it cannot be written."""
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        give_usual_rights(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
