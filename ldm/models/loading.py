"""A model from disk, ready to use: a run folder or one of diffusers, a file with its config inside, or both files.

Ours and published ones; the weights are read without running anything that files name (see `ldm.weights`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ldm import compat, config
from ldm.config.check import check_value
from ldm.config.files import CONFIGS_OF_RUNS, config_of_run
from ldm.config.nodes import is_node, without_checkpoints
from ldm.config.overrides import apply_overrides
from ldm.config.plain import resolve
from ldm.config.targets import find_target
from ldm.config.text import parse
from ldm.data.core.decoding import Range, check_range
from ldm.errors import ConfigError, UserError
from ldm.models.autoencoder import Autoencoder
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.weights import load as checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a run folder or file that has its config with it, or a config and a checkpoint.

    weights: "ema" for the averaged weights where there are any, "raw" for the trained ones.
    """

    run: str | Path | None = None
    config: str | Path | None = None
    checkpoint: str | Path | None = None
    weights: Literal["ema", "raw"] = "ema"

    @staticmethod
    def of(source: ModelSource | str | Path) -> ModelSource:
        """Accept a path in place of the object."""
        return source if isinstance(source, ModelSource) else ModelSource(source)

    def files(self) -> tuple[Path, Path]:
        """Return the files of config and weights; one with its config inside is both.

        UserError says what is missing and where it was looked for.
        """
        if self.run is None and self.checkpoint is None:
            hint = "; weights are needed beside --config" if self.config else ""
            raise UserError(f"no model: give --run FOLDER, or --config YAML with --ckpt FILE{hint}")
        found = checkpoint.locate(self.run if self.checkpoint is None else self.checkpoint)
        if self.config is not None:
            return Path(self.config), found
        is_folder = self.run is not None and Path(self.run).is_dir()
        is_inside = checkpoint.is_index(found) or "config" in checkpoint.metadata(found)
        beside = found if is_inside else config_of_run(self.run if is_folder else found)
        if beside is None:
            raise UserError(f"{found}: no {' or '.join(CONFIGS_OF_RUNS[:2])} beside it; give --config YAML")
        return beside, found


@dataclass(frozen=True)
class Loaded:
    """Files from which a model was loaded; content is the config, in our dialect."""

    config: Path
    checkpoint: Path
    weights: str
    content: dict[str, Any]

    def provenance(self) -> dict[str, str]:
        """Return the names of the files, and the SHA-256 of the checkpoint (of all its files, in turn)."""
        whole = hashlib.sha256()
        for path in checkpoint.files_of(self.checkpoint):
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: whole)
        digest = whole.hexdigest()
        paths = {"config": str(self.config), "checkpoint": str(self.checkpoint)}
        return {**paths, "weights": self.weights, "checkpoint_sha256": digest}

    @property
    def value_range(self) -> Range | None:
        """Values of black and white in the files of more than 8 bits that the model was trained on."""
        return check_range(train_option(self.content, "value_range"))


@dataclass(frozen=True)
class LoadedModel(Loaded):
    """A latent diffusion model in eval mode with where it came from."""

    model: LatentDiffusion

    def trained_size(self) -> tuple[int, int]:
        """Return (height, width) of the training images. UserError if neither model nor config says it."""
        if self.model.image_size is None:
            raise UserError(f"{self.config}: does not say the size of the images; give --H and --W")
        return self.model.image_size

    def size(self, asked: tuple[int | None, int | None]) -> tuple[int, int]:
        """Return (height, width) as asked for, the sides of the training images where None."""
        height, width = self.trained_size() if None in asked else asked
        return asked[0] or height, asked[1] or width

    def warn_of_untrained_guidance(self, guidance: float) -> None:
        """Warn where conditions were never dropped in training, so that guidance has nothing to extrapolate from."""
        stage = self.model.cond_stage_model
        if guidance != 1.0 and stage is not None:
            rates = [stage.drop_rate, *(conditioner.drop_rate for conditioner in self.model.conditioners())]
            if not any(rates):
                message = "guidance %g: may harm, as this model has drop_rate 0, so that 'no condition' is new to it"
                _log.warning(message, guidance)


@dataclass(frozen=True)
class LoadedFirstStage(Loaded):
    """An autoencoder in eval mode with where it came from."""

    autoencoder: Autoencoder


def load_model(
    source: ModelSource | str | Path, device: torch.device | str = "cpu", overrides: Sequence[str] = ()
) -> LoadedModel:
    """Load a latent diffusion model, with overrides `model.key=value` of its config.

    UserError for absent files, other overrides, and weights that do not fit.
    """
    source = ModelSource.of(source)
    config_path, checkpoint_path = source.files()
    content = _read(config_path, overrides)
    try:
        section = content["model"]
        if find_target(section["target"], "model") is not LatentDiffusion:
            raise ConfigError(f"is {section['target']}; samples need a LatentDiffusion", "model.target")
        model: LatentDiffusion = config.instantiate(_without_training(section), "model")
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(config_path)) from error
    checkpoint_path, state = checkpoint.newest(checkpoint_path)
    checkpoint.load_into(model, checkpoint.choose(state, source.weights), source=str(checkpoint_path))
    model.config = section
    if (size := train_option(content, "size")) is not None and model.latent_size is None:
        check_value(size, int | tuple[int, int], "data.params.train.params.size")
        model.image_size = (size, size) if isinstance(size, int) else tuple(size)
    model = model.eval().requires_grad_(False).to(device)
    return LoadedModel(config_path, checkpoint_path, source.weights, content, model)


def load_first_stage(source: ModelSource | str | Path, device: torch.device | str = "cpu") -> LoadedFirstStage:
    """Load an autoencoder: a trained one, or that inside of a latent diffusion model."""
    source = ModelSource.of(source)
    config_path, checkpoint_path = source.files()
    content = _read(config_path)
    try:
        node, prefix = _first_stage_node(content["model"])
        autoencoder = config.instantiate(_without_training(node), "model")
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(config_path)) from error
    checkpoint_path, state = checkpoint.newest(checkpoint_path)
    state = checkpoint.choose(state, source.weights)
    parts = tuple(f"{name}." for name, _ in autoencoder.named_children())
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    state = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    checkpoint.load_into(autoencoder, state, source=str(checkpoint_path))
    autoencoder = autoencoder.eval().requires_grad_(False).to(device)
    return LoadedFirstStage(config_path, checkpoint_path, source.weights, content, autoencoder)


def read_config(source: ModelSource | str | Path) -> dict[str, Any]:
    """Read the config of a model, in our dialect; data that it was trained on need not be there."""
    return _read(ModelSource.of(source).files()[0])


def is_first_stage(source: ModelSource | str | Path) -> bool:
    """Return whether a model is an autoencoder, rather than one that samples."""
    return find_target(read_config(source)["model"]["target"], "model") is Autoencoder


def train_option(content: dict[str, Any], name: str) -> Any:
    """Find a parameter of the training set, or of the data set which it wraps; None if the config does not have it."""
    data = content.get("data")
    params = data.get("params") if isinstance(data, dict) else None
    node = params.get("train") if isinstance(params, dict) else None
    while isinstance(node, dict) and isinstance(params := node.get("params"), dict):
        if params.get(name) is not None:
            return params[name]
        node = params.get("dataset")
    return None


def _first_stage_node(section: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Find the node of the autoencoder, and the beginning of its weights' names."""
    target = find_target(section["target"], "model")
    if target is Autoencoder:
        return section, ""
    if target is not LatentDiffusion:
        raise ConfigError(f"is {section['target']}; a first stage is an Autoencoder", "model.target")
    params = section.get("params")
    inner = params.get("autoencoder") if isinstance(params, dict) else None
    if not is_node(inner):
        raise ConfigError("missing; it names the first stage", "model.params.autoencoder")
    if find_target(inner["target"], "model.params.autoencoder") is not Autoencoder:
        raise ConfigError("this model works on pixels; it has no first stage", "model.params.autoencoder.target")
    return inner, "first_stage_model."


def _without_training(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out the weights that training started from, which need not be there any more: the checkpoint has all."""
    return without_checkpoints({key: section.get(key) for key in ("target", "params")})


def _inside(path: Path) -> dict[str, Any]:
    """Return the config that a file of weights holds. Raises ConfigError."""
    try:
        content = parse(checkpoint.metadata(path)["config"])
    except ValueError as error:
        raise ConfigError(f"the config in it is not valid YAML: {error}", source=str(path)) from error
    if not isinstance(content, dict):
        raise ConfigError("the config in it is no mapping", source=str(path))
    return content


def _read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    if wrong := [word for word in overrides if not word.startswith("model.")]:
        raise UserError(f"{wrong[0]}: has no effect on samples; override model.key=value")
    if checkpoint.is_index(path):
        content = apply_overrides({"model": compat.diffusers.read(path).section}, overrides)
    elif path.suffix in (".safetensors", ".zip"):
        content = compat.translate(resolve(apply_overrides(_inside(path), overrides)))
    else:
        content = compat.translate(compat.read(path, overrides))
    if not isinstance(content.get("model"), dict) or "target" not in content["model"]:
        raise UserError(f"{path}: has no section model with a target")
    return content
