"""Tensors of folders as diffusers writes them, under our names, and ours under theirs.

The names are tables of `ldm.compat.diffusers`. Beside names two things differ: pointwise convolutions here are linear
layers there, and queries, keys and values that one projection makes here are three layers there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.compat import diffusers
from ldm.compat.diffusers import Part, Rename
from ldm.errors import UserError

State = dict[str, Tensor]
_ENDINGS = ("safetensors", "safetensors.index.json", "bin", "bin.index.json", "fp16.safetensors", "fp16.bin")


def to_ours(state: Mapping[str, Tensor], renames: Iterable[Rename]) -> State:
    """Return tensors of theirs under our names; what no rename knows keeps its name, and absent parts stay absent."""
    table = {name: (rename, place) for rename in renames for place, name in enumerate(rename.theirs)}
    ours: State = {}
    joined: dict[str, tuple[Rename, dict[int, Tensor]]] = {}
    for name, tensor in state.items():
        found, rest = longest(name, table)
        if found is None:
            ours[name] = tensor
            continue
        rename, place = found
        tensor = tensor.T if rename.transposed else tensor
        tensor = tensor.reshape(*tensor.shape, *[1] * rename.axes) if tensor.ndim == 2 else tensor
        if len(rename.theirs) == 1:
            ours[rename.ours + rest] = tensor
        else:
            joined.setdefault(rename.ours + rest, (rename, {}))[1][place] = tensor
    for name, (rename, thirds) in joined.items():
        if len(thirds) == len(rename.theirs):
            ours[name] = _join([thirds[place] for place in sorted(thirds)], rename.groups)
    return ours


def to_theirs(state: Mapping[str, Tensor], renames: Iterable[Rename], strict: bool = True) -> State:
    """Return tensors of ours under their names. KeyError, if strict, for a name that no rename knows."""
    table = {rename.ours: rename for rename in renames}
    theirs: State = {}
    for name, tensor in state.items():
        rename, rest = longest(name, table)
        if rename is None:
            if strict:
                raise KeyError(name)
            theirs[name] = tensor
            continue
        tensor = tensor.T if rename.transposed else tensor
        parts = split(tensor, rename.groups) if len(rename.theirs) == 3 else [tensor][: len(rename.theirs)]
        for new, part in zip(rename.theirs, parts, strict=True):
            theirs[new + rest] = part if part.ndim < 2 or not rename.axes else part.flatten(part.ndim - rename.axes - 1)
    return theirs


def longest(name: str, table: Mapping[str, object]) -> tuple[object, str]:
    """Return the entry of the longest beginning of a dotted name, and the rest of the name."""
    head = name
    while head:
        if head in table:
            return table[head], name[len(head) :]
        head = head.rpartition(".")[0]
    return None, name


def _join(thirds: Sequence[Tensor], groups: int) -> Tensor:
    return torch.stack([third.unflatten(0, (groups, -1)) for third in thirds], dim=1).flatten(0, 2)


def split(tensor: Tensor, groups: int) -> list[Tensor]:
    """Return queries, keys and values of a projection, `groups` times one after the other in its first axis."""
    return [third.flatten(0, 1) for third in tensor.unflatten(0, (groups, 3, -1)).unbind(1)]


# ------------------------------------------------------------------------------------------------------------- reading


def weights_of(index: Path) -> list[Path]:
    """Return the files of weights of a folder. UserError names what is missing of it."""
    return [file for part in diffusers.read(index).parts for file in _files(index.parent / part.folder, part)]


def read(index: Path, read_file: Callable[[Path], State]) -> State:
    """Return all tensors of a folder under our names, each file read by `read_file`. UserError if one is missing."""
    state: State = {}
    for part in diffusers.read(index).parts:
        theirs: State = {}
        for file in _files(index.parent / part.folder, part):
            theirs |= read_file(file)
        for old, new in part.kind.aliases.items():
            theirs = {re.sub(old, new, name): tensor for name, tensor in theirs.items()}
        state |= {part.prefix + name: tensor for name, tensor in to_ours(theirs, part.names).items()}
    return state


def _files(folder: Path, part: Part) -> list[Path]:
    """Return the files of weights of a component: the first kind that is there, all of its shards."""
    for ending in _ENDINGS:
        file = folder / f"{part.kind.weights}.{ending}"
        if file.is_file():
            return _shards(file) if ending.endswith(".json") else [file]
    name = part.kind.weights
    raise UserError(f"{folder}: holds no weights; copy {name}.safetensors (or .bin) there, or the whole folder again")


def _shards(index: Path) -> list[Path]:
    names = diffusers.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: has no weight_map that names files")
    files = [index.parent / Path(name).name for name in dict.fromkeys(names.values())]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is missing, {index.name} names it; copy the whole folder again")
    return files


# ------------------------------------------------------------------------------------------------------------- writing


def states_of(parts: Iterable[Part], state: Mapping[str, Tensor]) -> Iterable[tuple[Part, State]]:
    """Yield the tensors of each part of a folder under their names, from those of our model."""
    for part in parts:
        inner = {name.removeprefix(part.prefix): value for name, value in state.items() if name.startswith(part.prefix)}
        tokenizer = "tokenizer."  # a vocabulary of ours is written as the tokenizer's own file
        yield part, to_theirs({name: value for name, value in inner.items() if not name.startswith(tokenizer)},
                              part.names)  # fmt: skip
