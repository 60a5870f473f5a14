"""Names of weights in the single files of Stable Diffusion 1, 2 and XL, and of what communities made of them <-> ours.

The U-Net and the first stage have the same names everywhere. The text encoders have those of OpenCLIP (queries, keys
and values joined) or of transformers, with or without `text_model.` (NovelAI), below `cond_stage_model` or, numbered,
below `conditioner.embedders` (sgm). Here a Rename has the name in the file as `ours`, the joined side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ldm.compat.diffusers.pipelines import CONFIG, read_json
from ldm.compat.diffusers.rules import Node, Rename
from ldm.config.nodes import is_node

ROOT, NUMBERED = "cond_stage_model.", "conditioner.embedders."
_OF_SEVERAL = ("ldm.conditioning.base.", "ldm.conditioning.text.CLIPTextConditioner")
_OF_OPEN_CLIP, _OF_NOVEL_AI = "model.token_embedding.weight", "transformer.embeddings.token_embedding.weight"
_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
          "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
_PROJECTION = "transformer.text_projection.weight"
_NUMBER_OF_LAYER = re.compile(r"\.(?:resblocks|layers)\.([0-9]{1,4})\.")


def renames(names: Iterable[str], own: Iterable[str]) -> list[Rename]:
    """Return how the tensors of a file, by their names, get the names of our model; none for a file that has them."""
    names, own = list(names), list(own)
    found: list[Rename] = []
    for theirs, ours in _paired(names, own):
        inner = {name.removeprefix(theirs) for name in names if name.startswith(theirs)}
        if _OF_OPEN_CLIP in inner:
            found += _open_clip(theirs, ours, inner, own)
        elif _OF_NOVEL_AI in inner:
            found.append(Rename(f"{theirs}transformer", (f"{ours}transformer.text_model",)))
        elif theirs != ours:
            found.append(Rename(theirs.rstrip("."), (ours.rstrip("."),)))
    return found


def published(own: Iterable[str], section: Node) -> list[Rename]:
    """Return how the tensors of our model, by their names and its section `model`, get the names of published files."""
    own = list(own)
    conditioner = (section.get("params") or {}).get("conditioner")
    if not is_node(conditioner) or not conditioner["target"].startswith(_OF_SEVERAL):
        return []
    params, kind = conditioner.get("params") or {}, conditioner["target"].rpartition(".")[2]
    numbered = kind == "StackedConditioner"
    joint = _groups(own, ROOT) if numbered or kind == "JointConditioner" else [ROOT]
    if len(joint) > 1 and not numbered:
        return []  # as no published file has it
    found: list[Rename] = []
    for index, ours in enumerate(joint):
        theirs = f"{NUMBERED}{index}." if numbered else ROOT
        inner = {name.removeprefix(ours) for name in own if name.startswith(ours)}
        if _is_open_clip(conditioner if ours == ROOT else params.get(ours[len(ROOT) : -1])):
            found += _open_clip(theirs, ours, inner, own)
        elif theirs != ours:
            found.append(Rename(theirs.rstrip("."), (ours.rstrip("."),)))
    return found


def _is_open_clip(node: Node | None) -> bool:
    """Return whether a conditioner is a text model of OpenCLIP, by its version or by how it is used."""
    params = (node or {}).get("params") or {}
    config = Path(str(params.get("version", ""))) / CONFIG
    return (
        params.get("layer") == "penultimate"
        or params.get("pooled") == "projected"
        or str(params.get("version", "")).startswith("laion/")
        or (config.is_file() and read_json(config).get("hidden_act") == "gelu")
    )


def _paired(names: Sequence[str], own: Sequence[str]) -> list[tuple[str, str]]:
    """Return the beginnings of the names of each embedder, in the file and here."""
    theirs = _groups(names, NUMBERED) or ([ROOT] if any(name.startswith(ROOT) for name in names) else [])
    children = _groups(own, ROOT)
    if any(name.startswith(ROOT) for name in {*names} & {*own}):
        return []
    if theirs and len(theirs) == len(children) and (theirs != [ROOT] or _is_joint(own)):
        return list(zip(theirs, children, strict=True))
    return [(theirs[0], ROOT)] if len(theirs) == 1 else []


def _is_joint(own: Sequence[str]) -> bool:
    """Return whether our text encoders are children of a conditioner of several."""
    return not any(name.startswith(f"{ROOT}transformer.") for name in own)


def _groups(names: Iterable[str], root: str) -> list[str]:
    """Return the beginnings of names one component below a root, numbers in their order."""
    heads = dict.fromkeys(name[len(root) :].partition(".")[0] for name in names if name.startswith(root))
    return [
        f"{root}{head}." for head in sorted(heads, key=lambda head: (len(head), head) if head.isdecimal() else (0, ""))
    ]


def _open_clip(theirs: str, ours: str, inner: Iterable[str], own: Iterable[str]) -> list[Rename]:
    own, inner = set(own), list(inner)
    model, text = f"{theirs}model", f"{ours}transformer.text_model"
    found = [
        Rename(f"{model}.token_embedding", (f"{text}.embeddings.token_embedding",)),
        Rename(f"{model}.positional_embedding", (f"{text}.embeddings.position_embedding.weight",)),
        Rename(f"{model}.ln_final", (f"{text}.final_layer_norm",)),
        # What is not here says nothing: the scale of CLIP's loss, a layer after the one that is used.
        Rename(f"{model}.logit_scale", ()),
        Rename(f"{model}.attn_mask", ()),
        Rename(f"{model}.text_projection", (f"{ours}{_PROJECTION}",) if f"{ours}{_PROJECTION}" in own else (),
               transposed=True),
    ]  # fmt: skip
    numbers = {int(match[1]) for name in inner if (match := _NUMBER_OF_LAYER.search(name))}
    for number in sorted(numbers):
        block, layer = f"{model}.transformer.resblocks.{number}", f"{text}.encoder.layers.{number}"
        if f"{layer}.layer_norm1.weight" not in own:
            found.append(Rename(block, ()))
            continue
        found += [Rename(f"{block}.{old}", (f"{layer}.{new}",)) for old, new in _LAYER.items()]
        for kind in ("weight", "bias"):
            thirds = tuple(f"{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            found.append(Rename(f"{block}.attn.in_proj_{kind}", thirds))
    return found
