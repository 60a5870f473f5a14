"""A model from disk, ready to use: a run folder or one of diffusers, a file with its config inside, or both files.

Ours and published ones; the weights are read without running anything that files name (see `ldm.weights`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm import compat, config
from ldm.conditioning.text import text_keys
from ldm.config.check import check_value
from ldm.config.files import CONFIGS_OF_RUNS, config_of_run
from ldm.config.nodes import is_node, without_checkpoints
from ldm.config.overrides import apply_overrides
from ldm.config.plain import resolve
from ldm.config.targets import find_target
from ldm.config.text import parse
from ldm.data.core.decoding import Range, check_range
from ldm.errors import ConfigError, UserError
from ldm.models.adapting import merge
from ldm.models.autoencoder import Autoencoder
from ldm.models.guidance import average_of
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.networks import fused_norm
from ldm.weights import load as checkpoint
from ldm.weights.adapters import adapter_in, is_of_adapter

UNTRAINED_FIRST_STAGE = "model.params.autoencoder: the first stage has no trained weights; give it `checkpoint: PATH`"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a run folder or file that has its config with it, or a config and a checkpoint.

    weights: "ema" for the averaged weights where there are any, "raw" for the trained ones, or the name of one of the
        averages of `training.params.averages`.
    adapters: what is merged into them, each `FILE` or `FILE:0.8`.
    """

    run: str | Path | None = None
    config: str | Path | None = None
    checkpoint: str | Path | None = None
    weights: str = "ema"
    adapters: tuple[str, ...] = ()

    @staticmethod
    def of(source: ModelSource | str | Path) -> ModelSource:
        """Accept a path in place of the object."""
        return source if isinstance(source, ModelSource) else ModelSource(source)

    def guide(self, text: str | None) -> ModelSource | None:
        """Return what a guide is read from: another run or checkpoint, or (`ema:NAME`) another average of this one."""
        if text is None:
            return None
        average = average_of(text)
        return ModelSource(text) if average is None else replace(self, weights=average)

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
        if checkpoint.is_index(found) or "config" in checkpoint.metadata(found):
            return found, found
        beside = config_of_run(self.run if is_folder else found)
        if beside in (None, found):  # or a config was given in place of weights
            raise UserError(f"{found}: no {' or '.join(CONFIGS_OF_RUNS[:2])} beside it; give --config YAML")
        return beside, found


@dataclass(frozen=True)
class Loaded:
    """Files from which a model was loaded; content: the config, in our dialect; adapters: each with its hash."""

    config: Path
    checkpoint: Path
    weights: str
    content: dict[str, Any]
    adapters: dict[str, str]

    def provenance(self) -> dict[str, Any]:
        """Return the names of the files, and the SHA-256 of the checkpoint (of all its files, in turn)."""
        whole = hashlib.sha256()
        for path in checkpoint.files_of(self.checkpoint):
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: whole)
        digest = whole.hexdigest()
        paths = {"config": str(self.config), "checkpoint": str(self.checkpoint)}
        more = {"adapters": self.adapters} if self.adapters else {}
        return {**paths, "weights": self.weights, "checkpoint_sha256": digest, **more}

    @property
    def value_range(self) -> Range | None:
        """Values of black and white in the files of more than 8 bits that the model was trained on."""
        return check_range(train_option(self.content, "value_range"))


@dataclass(frozen=True)
class LoadedModel(Loaded):
    """A latent diffusion model in eval mode with where it came from; averages: what else its file holds weights of."""

    model: LatentDiffusion
    averages: tuple[str, ...] = ()

    def trained_size(self) -> tuple[int, int]:
        """Return (height, width) of the training images. UserError if neither model nor config says it."""
        if self.model.image_size is None:
            raise UserError(f"{self.config}: does not say the size of the images; give --H and --W")
        return self.model.image_size

    def size(self, asked: tuple[int | None, int | None]) -> tuple[int, int]:
        """Return (height, width) as asked for, the sides of the training images where None."""
        height, width = self.trained_size() if None in asked else asked
        return height if asked[0] is None else asked[0], width if asked[1] is None else asked[1]

    def trained_tile(self) -> int:
        """Return the side of tiles that are as large as the training images, rounded up for the model."""
        multiple = self.model.side_multiple
        return -(-max(self.trained_size()) // multiple) * multiple

    def text_keys(self) -> list[str]:
        """Return the batch keys of the texts that the model is conditioned on, perhaps none."""
        return text_keys(self.model.conditioners())


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
    content = _read((config_path, checkpoint_path), overrides)
    checkpoint_path, state = checkpoint.newest(checkpoint_path)
    is_alone = checkpoint.is_network_alone(state)
    try:
        section = content["model"]
        if find_target(section["target"], "model") is not LatentDiffusion:
            raise ConfigError(f"is {section['target']}; samples need a LatentDiffusion", "model.target")
        node = _around_network(section) if is_alone else _without_training(section)
        model: LatentDiffusion = config.instantiate(node, "model")
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(config_path)) from error
    if is_alone:
        _warn_of_untrained_first_stage(node)
    averages = tuple(checkpoint.choices(state))
    state = checkpoint.choose(state, source.weights)
    checkpoint.load_into(model, state, source=str(checkpoint_path))
    if not model.scale_is_known:
        raise UserError(f"{checkpoint_path}: holds no latent scale; give it as model.params.latent_scale=NUMBER")
    model.config = section
    adapters = _adapt(model, section, checkpoint_path, state, source.adapters)
    if (size := train_option(content, "size")) is not None and model.latent_size is None:
        check_value(size, int | tuple[int, int], "data.params.train.params.size")
        model.image_size = (size, size) if isinstance(size, int) else tuple(size)
    model = placed(model, torch.device(device))
    return LoadedModel(config_path, checkpoint_path, source.weights, content, adapters, model, averages)


def placed(module: nn.Module, device: torch.device) -> Any:
    """Return a module on a device, for use alone; channels last in memory where our kernels normalise such images."""
    module = module.eval().requires_grad_(False).to(device)
    if device.type == "cuda" and fused_norm.is_available(device):
        module.to(memory_format=torch.channels_last)
    return module


def load_first_stage(source: ModelSource | str | Path, device: torch.device | str = "cpu") -> LoadedFirstStage:
    """Load an autoencoder: a trained one, or that inside of a latent diffusion model."""
    source = ModelSource.of(source)
    config_path, checkpoint_path = source.files()
    content = _read((config_path, checkpoint_path))
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
    adapters = _adapt(autoencoder, node, checkpoint_path, state, source.adapters)
    autoencoder = placed(autoencoder, torch.device(device))
    return LoadedFirstStage(config_path, checkpoint_path, source.weights, content, adapters, autoencoder)


def _adapt(
    model: nn.Module, section: dict[str, Any], file: Path, state: dict[str, torch.Tensor], given: Sequence[str]
) -> dict[str, str]:
    """Merge adapters into a loaded model, which knows those that are in its weights already; see `merge`."""
    own = [adapter_in(state, str(file)).digest()] if any(map(is_of_adapter, state)) else []
    model.adapters = [*own, *checkpoint.metadata(file).get("adapters", "").split()]
    return merge(model, section, given)


def read_config(source: ModelSource | str | Path) -> dict[str, Any]:
    """Read the config of a model, in our dialect; data that it was trained on need not be there."""
    return _read(ModelSource.of(source).files())


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


def _around_network(section: dict[str, Any]) -> dict[str, Any]:
    """Leave out the weights that the network started from: only the other parts have those that the config names."""
    params = section.get("params")
    if isinstance(params, dict) and "network" in params:
        params = {**params, "network": without_checkpoints(params["network"])}
    return {"target": section["target"], "params": params}


def _warn_of_untrained_first_stage(node: dict[str, Any]) -> None:
    """Warn where the config of a model names no weights of its first stage, for a file that has none either."""
    first_stage = node["params"]["autoencoder"]
    is_needed = find_target(first_stage["target"], "model.params.autoencoder") is Autoencoder
    if is_needed and not first_stage.get("checkpoint"):
        _log.warning(UNTRAINED_FIRST_STAGE)


def _inside(path: Path) -> dict[str, Any]:
    """Return the config that a file of weights holds. Raises ConfigError."""
    try:
        content = parse(checkpoint.metadata(path)["config"])
    except ValueError as error:
        raise ConfigError(f"the config in it is not valid YAML: {error}", source=str(path)) from error
    if not isinstance(content, dict):
        raise ConfigError("the config in it is no mapping", source=str(path))
    return content


def _read(files: tuple[Path, Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a config, from the file of the weights if that is both. Raises UserError."""
    path = files[0]
    if wrong := [word for word in overrides if not word.startswith("model.")]:
        raise UserError(f"{wrong[0]}: has no effect on samples; override model.key=value")
    if checkpoint.is_index(path):
        content = apply_overrides({"model": compat.diffusers.read(path).section}, overrides)
    elif path == files[1]:
        content = compat.translate(resolve(apply_overrides(_inside(path), overrides)))
    else:
        content = compat.translate(compat.read(path, overrides))
    if not isinstance(content.get("model"), dict) or "target" not in content["model"]:
        raise UserError(f"{path}: has no section model with a target")
    return content
