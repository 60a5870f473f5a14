"""Adapters of whole models: read from a file or a run, merged into weights, and written alone.

A file has the names of diffusers (`unet.down_blocks...lora_A.weight`) where it knows the layers, else ours. Those of
kohya's scripts (`lora_unet_down_blocks_...lora_down.weight`) are read as well.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.compat import diffusers
from ldm.compat.diffusers import Part
from ldm.conditioning.text import CLIPTextConditioner
from ldm.errors import ConfigError, UserError, shown
from ldm.weights import folders
from ldm.weights import load as checkpoint
from ldm.weights.adapters import Adapter, Factors, adapter_in

_log = logging.getLogger(__name__)
_NETWORK = "model.diffusion_model."
_PARTS = {  # parameter of our model: folder of diffusers, beginning of names in our model
    "network": ("unet", _NETWORK),
    "autoencoder": ("vae", "first_stage_model."),
    "conditioner": ("text_encoder", "cond_stage_model."),
}
_FOLDERS = {"vqvae": "vae", "bert": "text_encoder"}  # of older pipelines
_OF_KOHYA = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}


def file_and_share(text: str) -> tuple[str, float]:
    """Split `FILE:0.8` into the file and the share of its change; without a number all of it. UserError for none."""
    path, colon, number = text.rpartition(":")
    try:
        share = float(number) if colon and not Path(text).exists() else None
    except ValueError:
        share = None
    if share is not None and not math.isfinite(share):
        raise UserError(f"--adapter {shown(text, 120)}: {number} is no share; give a number such as 0.8")
    return (text, 1.0) if share is None else (path, share)


def read_adapter(path: str | Path) -> Adapter:
    """Return the adapter of a file, or that (averaged) of a run. UserError if there is none, or if it is damaged."""
    file, state = checkpoint.newest(path)
    texts = {} if checkpoint.is_index(file) else checkpoint.metadata(file)
    found = adapter_in(checkpoint.choose(state, "ema"), str(file))
    if any(f"{layer}.weight" in state for layer in found.layers):
        return found  # of a run, among the weights of its base
    return Adapter.of(state, str(file), texts, strict=True)


def merge(model: nn.Module, section: Mapping[str, Any] | None, given: Sequence[str]) -> dict[str, str]:
    """Add adapters, each `FILE` or `FILE:0.8`, to the weights of a model.

    section: the config of the model, by which their names are translated. Returns what identifies each. UserError for
    an adapter of another base, and for one that is merged already.
    """
    found = {}
    for text in given:
        path, share = file_and_share(text)
        adapter = read_adapter(path)
        merged = getattr(model, "adapters", [])
        if adapter.digest() in merged:
            raise UserError(f"{adapter.source}: is merged into this model already; give it once, with another share")
        _merge(model, section, adapter, share)
        model.adapters = [*merged, adapter.digest()]
        found[text] = adapter.digest()
    return found


def _merge(model: nn.Module, section: Mapping[str, Any] | None, adapter: Adapter, share: float) -> None:
    for module in model.modules():
        if isinstance(module, CLIPTextConditioner):
            module.load_weights()  # which are otherwise read at the first use, over what is added here
    state, parts = model.state_dict(), components(section)
    theirs = {f"{part.folder}.{name}": tensor for part, tensors in folders.states_of(parts, state)
              for name, tensor in tensors.items()}  # fmt: skip
    adapter = replace(adapter, layers=_with_dots(adapter.layers, [*theirs, *state]))
    if any(f"{layer}.weight" in state for layer in adapter.layers):
        model.load_state_dict(adapter.applied(state, share))
        return
    changed = adapter.applied(theirs, share)
    for part in parts:
        start = f"{part.folder}."
        inner = {name.removeprefix(start): tensor for name, tensor in changed.items() if name.startswith(start)}
        ours = folders.to_ours(inner, part.names)
        model.load_state_dict({part.prefix + name: tensor for name, tensor in ours.items()}, strict=False)


def _with_dots(layers: Mapping[str, Factors], names: Iterable[str]) -> dict[str, Factors]:
    """Return factors under one of these names of weights in place of kohya's, who writes them with underscores."""
    known = {}
    for name in names:
        layer = name.removesuffix(".weight")
        folder, _, rest = layer.replace(_NETWORK, "unet.", 1).partition(".")
        known |= {f"{start}_{rest.replace('.', '_')}": layer for start in _OF_KOHYA.get(folder, ())}
    return {known.get(name, name): factors for name, factors in layers.items()}


def components(section: Mapping[str, Any] | None) -> list[Part]:
    """Return the parts of a model that diffusers can express, each with its folder there and its prefix here."""
    parts = []
    nodes = {} if section is None else section.get("params") or {}
    with suppress(ConfigError, UserError):
        if "network" in nodes:
            found = diffusers.write(copy.deepcopy(dict(section)), 1.0).parts
            return [replace(part, folder=_FOLDERS.get(part.folder, part.folder)) for part in found]
    whole = {"autoencoder": section} if "architecture" in nodes else nodes  # a first stage by itself
    for parameter, (folder, prefix) in _PARTS.items():
        if not whole.get(parameter):
            continue
        try:
            (part,) = diffusers.write(copy.deepcopy(dict(whole[parameter])), 1.0).parts
        except ConfigError as error:
            _log.debug("%s: %s", parameter, error)
            continue
        parts.append(replace(part, folder=folder, prefix="" if whole is not nodes else prefix))
    return parts


def in_names_of_diffusers(adapter: Adapter, section: Mapping[str, Any] | None) -> Adapter:
    """Return an adapter under the names that diffusers loads; as it is if one of its layers has none there."""
    parts, layers = components(section), {}
    for name, factors in adapter.layers.items():
        part = next((part for part in parts if name.startswith(part.prefix)), None)
        table = {} if part is None else {rename.ours: rename for rename in part.names}
        rename, rest = folders.longest(name.removeprefix("" if part is None else part.prefix), table)
        if rename is None or rename.transposed or not rename.theirs:
            _log.warning("%s: diffusers has no layer %s; the names are ours", adapter.source, shown(name, 100))
            return adapter
        for theirs, split in zip(rename.theirs, _split(factors, rename), strict=True):
            layers[f"{part.folder}.{theirs}{rest}"] = split
    return replace(adapter, layers=layers, identity=adapter.digest())


def _split(factors: Factors, rename: diffusers.Rename) -> list[Factors]:
    """Return the factors of each layer there for one here: queries, keys and values share A, and have a third of B."""

    def cut(tensor: Tensor | None) -> list[Tensor | None]:
        is_one = tensor is None or len(rename.theirs) == 1
        return [tensor] * len(rename.theirs) if is_one else folders.split(tensor, rename.groups)

    found = []
    for up, magnitude in zip(cut(factors.up), cut(factors.magnitude), strict=True):
        down = factors.down
        if rename.axes:
            down, up = down.flatten(1), up.flatten(1)
        if magnitude is not None and down.ndim > 2:
            magnitude = magnitude.view(1, -1, *[1] * (down.ndim - 2))
        found.append(Factors(down, up, factors.alpha, magnitude))
    return found
