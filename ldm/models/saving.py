"""One file with the weights of a model and its config, which `from_pretrained` and --run read."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from ldm.errors import UserError
from ldm.models.loading import ModelSource, read_config
from ldm.weights import files as storage
from ldm.weights import load as checkpoint

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion

_log = logging.getLogger(__name__)


def save_model(model: LatentDiffusion, path: str | Path, config: Mapping[str, Any] | None = None) -> Path:
    """Write weights and section `model` of the config; see `LatentDiffusion.save_pretrained`."""
    section = config if config is not None else model.config
    if section is None:
        raise UserError("save_pretrained: this model was not loaded from a config; give the section `model` as config")
    content = yaml.safe_dump({"model": dict(section)}, sort_keys=False, allow_unicode=True)
    return save_state(path, model.state_dict(), {"config": content})


def save_state(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors and texts as a safetensors file, whole or not at all. UserError if it cannot be written."""
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
    # One tensor may have two names; safetensors wants memory for each.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_safetensors(temporary, tensors, metadata)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def export_run(run: str | Path, out: Path, averaged: bool = False, half: bool = False) -> None:
    """Write the newest good checkpoint of a run to a file, whole or not at all. Raises UserError."""
    source = ModelSource(run)
    config = yaml.safe_dump(read_config(source), sort_keys=False, allow_unicode=True)
    found, state = checkpoint.newest(source.files()[1])
    if averaged:
        state = checkpoint.choose(state, "ema")
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_state(out, state, {"config": config, "checkpoint": found.name})
    _log.info("%s: %d tensors of %s", out, len(state), found)
