"""What a module has beyond the file that it starts from: averages, a loss, an adapter, further input channels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ldm.errors import some
from ldm.weights.adapters import is_of_adapter

State = dict[str, Tensor]
EMA, AVERAGES = "model_ema.", "averages."  # the published one, and further ones by name
_log = logging.getLogger(__name__)
_OF_TRAINING = ("loss", "logvar", "alignment")  # the names at the root of a state dict that only a training has


def averages_from_raw(expected: Iterable[str], state: Mapping[str, Tensor]) -> State:
    """Return raw weights in place of the averages that a checkpoint does not have."""
    raw = {shadow: value for name, value in state.items() for shadow in _shadows(name)}
    absent = [name for name in expected if _is_average(name) and name not in state]
    return {name: raw[shadow] for name in absent if (shadow := name.rpartition(".")[2]) in raw}


def _is_average(name: str) -> bool:
    return name.startswith((EMA, AVERAGES))


def _shadows(name: str) -> tuple[str, str]:
    """Return the names that a weight may have in an average: in that of all, and in that of the network alone."""
    return name.replace(".", ""), name.removeprefix("model.").replace(".", "")


def _averages_of(weights: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return which names are those of averages of some weights."""
    wanted = {shadow for name in weights for shadow in _shadows(name)}
    return {name for name in names if _is_average(name) and name.rpartition(".")[2] in wanted}


def begun_anew(wanted: Iterable[str], offered: Iterable[str], source: str) -> set[str]:
    """Name what a training adds to a model and a file has nothing of, which keeps its initial values; say so.

    A part, such as the discriminator of a loss, or all adapters, is in the file or is not: in pieces it is missing.
    """
    wanted, parts = list(wanted), {}
    for name in wanted:
        if part := _part_of_training(name):
            parts.setdefault(part, []).append(name)
    held = {_part_of_training(name) for name in offered}
    absent = {part: names for part, names in parts.items() if part not in held}
    if absent:
        found = some([f"{part} ({len(names)} tensors)" for part, names in absent.items()])
        _log.warning("%s: has no %s; they start anew", source, found)
    names = {name for members in absent.values() for name in members}
    return names | _averages_of(names, wanted)


def _part_of_training(name: str) -> str:
    if is_of_adapter(name):
        return "adapter"
    return ".".join(name.split(".")[:2]) if name.partition(".")[0] in _OF_TRAINING else ""


def widened(module: nn.Module, own: Mapping[str, Tensor], offered: Mapping[str, Tensor], source: str) -> State:
    """Return the first convolutions that have more input channels here than in a file, 0 for those; say so.

    Networks name theirs in `first_weight`; channels that are concatenated stand behind the others.
    """
    firsts = {id(part.get_parameter(part.first_weight)) for part in module.modules() if hasattr(part, "first_weight")}
    grown: State = {}
    for name in [name for name, tensor in own.items() if id(tensor) in firsts and name in offered]:
        given, here = offered[name], own[name]
        added = here.shape[1] - given.shape[1] if given.ndim == here.ndim else 0
        if added <= 0 or (len(given), *given.shape[2:]) != (len(here), *here.shape[2:]):
            continue
        for other in {name, *_averages_of([name], offered)}:
            zeros = offered[other].new_zeros(len(given), added, *given.shape[2:])
            grown[other] = torch.cat([offered[other], zeros], dim=1)
        numbers = (given.shape[1], here.shape[1])
        _log.warning("%s: %s has %d input channels, here %d; the added ones start at zero", source, name, *numbers)
    return grown
