"""Folders: a single component (`config.json`), or a pipeline (`model_index.json`) <-> section `model` of our config."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.compat.diffusers.first_stage import AUTOENCODER_KL, DEFAULT_SCALE, VQ_MODEL
from ldm.compat.diffusers.roles import (
    INPAINTING,
    LIBRARIES,
    NO_PART_OF_THE_MODEL,
    PIPELINES,
    STABLE,
    SUPER_RESOLUTION,
    TEXT,
    TEXTS,
    UNET,
    VAE,
    Role,
    conditioner,
    described,
)
from ldm.compat.diffusers.rules import Component, Node, Rename, Values
from ldm.compat.diffusers.schedule import SCHEDULERS, write_scheduler
from ldm.compat.diffusers.text import CLIP_TEXT, LDM_BERT
from ldm.compat.diffusers.unet import UNET_2D, UNET_2D_CONDITION
from ldm.errors import ConfigError, UserError

_log = logging.getLogger(__name__)
INDEX, CONFIG, SCHEDULER, TOKENIZER = "model_index.json", "config.json", "scheduler_config.json", "tokenizer"
VERSION = "0.42.1"  # of diffusers, whose fields these are
_MODEL = "ldm.models.latent_diffusion.LatentDiffusion"
_KINDS = {kind.name: kind for kind in (UNET_2D, UNET_2D_CONDITION, AUTOENCODER_KL, VQ_MODEL, LDM_BERT, CLIP_TEXT)}


@dataclass(frozen=True)
class Part:
    """One component of a folder: where it is, what it is, its config, and how its weights are named in our model."""

    folder: str
    kind: Component
    config: Values
    names: tuple[Rename, ...]
    prefix: str = ""

    @property
    def tokenizer(self) -> str:
        """Return the folder of the tokenizer that goes with a text encoder."""
        return self.folder.replace("text_encoder", TOKENIZER) if "text_encoder" in self.folder else TOKENIZER


@dataclass(frozen=True)
class Folder:
    """A folder in both dialects: our section `model`, their components, and their other JSON files by path."""

    section: Node
    parts: tuple[Part, ...]
    files: dict[str, Values]


def index_of(folder: str | Path) -> Path | None:
    """Return the JSON file that makes a folder one of diffusers or of a component of it; None for other folders."""
    for name in (INDEX, CONFIG):
        path = Path(folder) / name
        if path.is_file() and (name == INDEX or _class_of(read_json(path)) is not None):
            return path
    return None


def read_json(path: Path) -> Values:
    """Return the mapping that a JSON file holds. UserError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; copy the whole folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not readable JSON ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping")
    return content


def _class_of(config: Values) -> str | None:
    """Return their class that a config names, as diffusers or as transformers writes it."""
    architectures = config.get("architectures")
    named = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else "")
    return str(named) if "_class_name" in config or str(named) in _KINDS else None


# ------------------------------------------------------------------------------------------------------------- reading


def read(index: Path) -> Folder:
    """Return what the folder of an index describes. UserError, one line, for what is missing or not expressible."""
    content = read_json(index)
    name = str(_class_of(content))
    if index.name == CONFIG:
        part, node = _component(index.parent, "", tuple(_KINDS.values()), name)
        return Folder(node, (part,), {})
    if name not in PIPELINES:
        raise ConfigError(f"{name} is not supported; only {', '.join(PIPELINES)}", "_class_name", str(index))
    roles = PIPELINES[name]
    for key, value in content.items():
        is_absent = not isinstance(value, list) or value == [None, None] or key.startswith("_")
        if not is_absent and key not in (*roles, "scheduler", TOKENIZER, f"{TOKENIZER}_2", *NO_PART_OF_THE_MODEL):
            raise ConfigError(f"{value[-1]} is not supported in a {name}", key, str(index))
    found = {role.parameter: _component(index.parent, key, role.kinds, *_named(content, key), role.prefix)
             for key, role in roles.items()}  # fmt: skip
    for part, node in found.values():
        if part.kind in TEXTS:
            _complete_text(node, index.parent, part)
    params = {parameter: node for parameter, (_, node) in found.items()}
    params |= _schedule(index.parent / "scheduler" / SCHEDULER)
    first_stage = found["autoencoder"][0]
    params["latent_scale"] = (
        1.0 if name == SUPER_RESOLUTION else first_stage.config.get("scaling_factor", DEFAULT_SCALE)
    )
    if "scaling_factor" not in first_stage.config and name != SUPER_RESOLUTION:
        unscaled = "; if images are grey, set model.params.latent_scale=1.0" if first_stage.kind is VQ_MODEL else ""
        _log.warning("%s: has no scaling_factor; as in diffusers it is %g%s",
                     index.parent / first_stage.folder / CONFIG, DEFAULT_SCALE, unscaled)  # fmt: skip
    if (size := found["network"][0].config.get("sample_size")) is not None:
        params["latent_size"] = size
    try:
        params |= conditioner(name, params, content, found["network"][0].config)
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(index)) from error
    params = {key: value for key, value in params.items() if key not in ("text", "text_2")}
    return Folder({"target": _MODEL, "params": params}, tuple(part for part, _ in found.values()), {})


def _named(content: Values, key: str) -> tuple[str | None]:
    """Return the class that an index names for a folder."""
    value = content.get(key)
    return (value[-1] if isinstance(value, list) and value and isinstance(value[-1], str) else None,)


def _component(
    folder: Path, name: str, kinds: Sequence[Component], expected: str | None, prefix: str = ""
) -> tuple[Part, Node]:
    file = folder / name / CONFIG
    config = read_json(file)
    found = _class_of(config) or expected
    kind = next((kind for kind in kinds if kind.name == found), None)
    if kind is None:
        allowed = " or ".join(kind.name for kind in kinds)
        raise ConfigError(f"{found} is not supported here; only {allowed}", "_class_name", str(file))
    try:
        parameters = kind.read(config)
        node = kind.node(parameters)
        names = kind.names(kind.parameters(node)[0], config)
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(file)) from error
    return Part(name, kind, config, tuple(names), prefix), node


def _schedule(file: Path) -> Values:
    config = read_json(file)
    name = str(config.get("_class_name"))
    if name not in SCHEDULERS:
        raise ConfigError(f"{name} is not supported; only {', '.join(SCHEDULERS)}", "_class_name", str(file))
    try:
        return SCHEDULERS[name].read(config)
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(file)) from error


def _complete_text(node: Node, folder: Path, part: Part) -> None:
    """Add what a text conditioner reads from the folder; these pipelines are made for guidance."""
    tokenizer = folder / part.tokenizer
    if not tokenizer.is_dir():
        raise UserError(f"{tokenizer}: is missing; copy the whole folder")
    params = node["params"]
    params["drop_rate"] = 0.1
    if part.kind is not LDM_BERT:
        params |= {"version": str(folder / part.folder), "tokenizer": str(tokenizer)}
    else:
        sizes = {"max_length": params["max_length"], "vocab_size": params["vocab_size"]}
        target = "ldm.conditioning.tokenizers.HuggingFaceTokenizer"
        params["tokenizer"] = {"target": target, "params": {"name_or_path": str(tokenizer), **sizes}}


# ------------------------------------------------------------------------------------------------------------- writing


def write(section: Node, scale: float) -> Folder:
    """Return the folder for section `model` of our config: a pipeline, or one component.

    scale: by which latents are multiplied. ConfigError names the parameter that diffusers cannot express.
    """
    if section["target"] != _MODEL:
        part = _written(section, "", "", "model")
        if part.kind in VAE.kinds:
            part = replace(part, config={**part.config, "scaling_factor": scale})
        return Folder(section, (part,), {})
    params = section["params"]
    role_of = described(params)
    nodes = {UNET: (params["network"], "network"), VAE: (params["autoencoder"], "autoencoder"), **role_of.texts}
    parts = {}
    for role, (node, place) in nodes.items():
        is_inner = role.prefix.startswith(TEXT.prefix) and role is not TEXT  # there under its own name
        prefix = f"{TEXT.prefix}{place.rpartition('.')[2]}." if is_inner else role.prefix
        parts[role] = _written(node, "", prefix, f"model.params.{place}", role.kinds)
    pipeline = role_of.pipeline or _pipeline(parts)
    parts[UNET].config.update(role_of.network)
    folders = {role: key for key, role in PIPELINES[pipeline].items()}
    parts = {role: replace(part, folder=folders[role]) for role, part in parts.items()}
    if pipeline == SUPER_RESOLUTION and scale != 1.0:
        raise ConfigError(
            f"diffusers: {scale:g} is not 1: {SUPER_RESOLUTION} does not scale latents", "model.params.latent_scale"
        )
    parts[VAE].config["scaling_factor"] = scale
    parts[UNET].config["sample_size"] = _sample_size(params, parts[VAE])
    try:
        scheduler = write_scheduler(params["process"], params.get("prediction"))
    except ConfigError as error:
        raise ConfigError(error.problem, f"model.params.{error.path}") from error
    index = {
        "_class_name": pipeline,
        "_diffusers_version": VERSION,
        **{part.folder: [LIBRARIES.get(part.kind, "diffusers"), part.kind.name] for part in parts.values()},
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    if "vae" in PIPELINES[pipeline]:
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if pipeline in (STABLE, INPAINTING):
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    index |= role_of.index
    return Folder(section, tuple(parts.values()), {INDEX: index, f"scheduler/{SCHEDULER}": scheduler})


def _written(node: Node, folder: str, prefix: str, place: str, kinds: Sequence[Component] = ()) -> Part:
    kind = kinds[0] if len(kinds) == 1 else _kind_of(node, place)
    try:
        fields = kind.write(node)
    except ConfigError as error:
        raise ConfigError(error.problem, f"{place}.{error.path}") from error
    config = fields if kind.is_open else {"_class_name": kind.name, "_diffusers_version": VERSION, **fields}
    names = kind.names(kind.parameters(node)[0], config)
    return Part(folder, kind, config, tuple(names), prefix)


def _kind_of(node: Node, place: str) -> Component:
    """Return their component for a node of ours."""
    params = node.get("params") or {}
    regularizer = params.get("regularizer") or {}
    same_target = [kind for kind in _KINDS.values() if kind.target == node["target"]]
    if node["target"] == UNET_2D.target:
        return UNET_2D if params.get("context_dim") is None else UNET_2D_CONDITION
    if node["target"] == AUTOENCODER_KL.target:
        same_target = [kind for kind in same_target if kind.children["regularizer"] == regularizer.get("target")]
        place = f"{place}.params.regularizer"
    if not same_target:
        known = ", ".join(sorted({kind.target.rpartition(".")[2] for kind in _KINDS.values()}))
        raise ConfigError(f"diffusers: {regularizer.get('target') or node['target']} has no counterpart; only {known}",
                          f"{place}.target")  # fmt: skip
    return same_target[0]


def _pipeline(parts: dict[Role, Part]) -> str:
    """Return the pipeline of a text encoder. LDMTextToImagePipeline takes 77 tokens and f = 8, whatever is given."""
    text, first_stage = parts[TEXT], parts[VAE]
    factor = 2 ** (len(first_stage.config["block_out_channels"]) - 1)
    tokens = text.config["max_position_embeddings"]
    if text.kind is LDM_BERT and (tokens, factor) == (77, 8):
        return "LDMTextToImagePipeline"
    if first_stage.kind is VQ_MODEL:
        raise ConfigError(
            f"diffusers: text to image with a codebook needs 77 tokens and f = 8 there, not {tokens} and {factor}",
            "model.params.autoencoder.params.regularizer",
        )
    return STABLE


def _sample_size(params: Values, first_stage: Part) -> int:
    """Return the side of the latents."""
    size = params.get("latent_size")
    if size is None:
        return first_stage.config["sample_size"] // 2 ** (len(first_stage.config["block_out_channels"]) - 1)
    if not isinstance(size, int):
        if len(set(size)) != 1:
            raise ConfigError(f"diffusers: {list(size)} is no square", "model.params.latent_size")
        size = size[0]
    return size
