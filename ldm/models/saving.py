"""The weights of a model on disk for others: one file with its config, or a folder as diffusers has them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from torch import Tensor, nn

from ldm.compat import diffusers
from ldm.compat.diffusers import Folder
from ldm.conditioning.text import CLIPTextConditioner
from ldm.errors import UserError
from ldm.models.loading import ModelSource, is_first_stage, load_first_stage, load_model, read_config
from ldm.weights import files as storage
from ldm.weights import folders
from ldm.weights import load as checkpoint
from ldm.writing import replacing

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion

_log = logging.getLogger(__name__)
Format = Literal["safetensors", "diffusers", "compvis"]
FORMATS: tuple[Format, ...] = get_args(Format)


def save_model(
    model: LatentDiffusion, path: str | Path, config: Mapping[str, Any] | None = None, format: Format = "safetensors"
) -> Path:
    """Write weights and section `model` of the config; see `LatentDiffusion.save_pretrained`."""
    section = config if config is not None else model.config
    if section is None:
        raise UserError("save_pretrained: this model was not loaded from a config; give the section `model` as config")
    if format not in FORMATS:
        raise UserError(f"save_pretrained: format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if format == "diffusers":
        return save_folder(path, model, dict(section))
    if format == "compvis":
        return save_checkpoint(path, model.state_dict())
    content = yaml.safe_dump({"model": dict(section)}, sort_keys=False, allow_unicode=True)
    return save_state(path, model.state_dict(), {"config": content})


def save_state(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors and texts as a safetensors file, whole or not at all. UserError if it cannot be written."""
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    # One tensor may have two names; safetensors wants memory for each.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    return _write_whole(path, lambda beside: storage.write_safetensors(beside, tensors, metadata))


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor]) -> Path:
    """Write tensors as the checkpoints of CompVis are, without config. UserError if it cannot be written."""
    path = Path(path)
    path = path if path.suffix == ".ckpt" else path.with_name(f"{path.name}.ckpt")
    content = {"state_dict": {name: value.detach().cpu() for name, value in state.items()}}
    return _write_whole(path, lambda beside: storage.write(content, beside))


def save_folder(path: str | Path, model: nn.Module, section: dict[str, Any], half: bool = False) -> Path:
    """Write a latent diffusion model or an autoencoder as a new folder that diffusers reads, whole or not at all.

    section: the config from which it was built. UserError names the parameter that diffusers cannot express.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already; name a new folder")
    described = diffusers.write(section, _scale_of(model))
    conditioner = getattr(model, "cond_stage_model", None)
    if isinstance(conditioner, CLIPTextConditioner):
        conditioner.load_weights()  # which are otherwise read at the first use
    state = halved(model.state_dict()) if half else model.state_dict()
    return _write_whole(path, lambda beside: _write_folder(beside, described, state, conditioner))


def _write_whole(path: Path, write: Callable[[Path], None]) -> Path:
    """Write a file or a new folder beside its place, then move it there. UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            write(beside)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _scale_of(model: nn.Module) -> float:
    """Return the factor of the latents: as the config has it, or as it was measured; 1 for a first stage."""
    scale = getattr(model, "latent_scale", None)
    if scale is None:
        return 1.0
    return float(model.scale_factor if scale.is_measured else scale.value)


def _write_folder(path: Path, described: Folder, state: Mapping[str, Tensor], conditioner: nn.Module | None) -> None:
    for part, tensors in folders.states_of(described.parts, state):
        save_state(path / part.folder / f"{part.kind.weights}.safetensors", tensors, {"format": "pt"})
        of_clip = conditioner.transformer.text_model.config.to_dict() if part.kind is diffusers.CLIP_TEXT else {}
        _write_json(path / part.folder / diffusers.CONFIG, {**of_clip, **part.config})
    if conditioner is not None:
        conditioner.tokenizer.save_folder(path / diffusers.TOKENIZER)
        config = diffusers.read_json(path / diffusers.TOKENIZER / "tokenizer_config.json")
        described.files[diffusers.INDEX][diffusers.TOKENIZER] = ["transformers", config["tokenizer_class"]]
    for name, content in described.files.items():
        _write_json(path / name, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with floating-point numbers in 16 bits."""
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def export_run(
    run: str | Path, out: Path, averaged: bool = False, half: bool = False, format: Format = "safetensors"
) -> None:
    """Write the newest good checkpoint of a run, whole or not at all. Raises UserError.

    A folder of diffusers gets the averaged weights, for which it has one place only.
    """
    source = ModelSource(run)
    if format == "diffusers":
        if is_first_stage(source):
            loaded = load_first_stage(source)
            model, section = loaded.autoencoder, loaded.content["model"]
        else:
            model = load_model(source).model
            section = model.config
        written = save_folder(out, model, section, half)
        _log.info("%s: written for diffusers", written)
        return
    config = yaml.safe_dump(read_config(source), sort_keys=False, allow_unicode=True)
    found, state = checkpoint.newest(source.files()[1])
    if averaged:
        state = checkpoint.choose(state, "ema")
    if half:
        state = halved(state)
    if format == "compvis":
        out = save_checkpoint(out, state)
    else:
        out = save_state(out, state, {"config": config, "checkpoint": found.name})
    _log.info("%s: %d tensors of %s", out, len(state), found)
