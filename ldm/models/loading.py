"""A model from disk, ready to sample: a run folder, or a config with a checkpoint, ours or published."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import compat, config
from ldm.compat.compvis.diffusion import published_latent_size
from ldm.config.files import CONFIGS_OF_RUNS, config_of_run
from ldm.config.targets import find_target
from ldm.data.core.decoding import Range, check_range
from ldm.doctor.data_fit import side_multiple
from ldm.errors import ConfigError, UserError
from ldm.models.autoencoder import Autoencoder
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.weights import load as checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """Hold a model in eval mode with where it came from; `content` is its config."""

    model: LatentDiffusion
    config: Path
    checkpoint: Path
    weights: str
    content: dict[str, Any]

    def provenance(self) -> dict[str, str]:
        """Name the files, and the content of the weights by its SHA-256."""
        return _provenance(self.config, self.checkpoint, self.weights)

    def trained_size(self) -> tuple[int, int]:
        """Tell the (height, width) of the training pictures.

        In configs of the original that of the latents times f; else the data's `size`, or the autoencoder's resolution.
        """
        size, factor = published_latent_size(self.content["model"]), self.model.first_stage_model.factor
        if size is None:
            size, factor = train_option(self.content, "size"), 1
        if size is None:
            architecture = getattr(self.model.first_stage_model, "architecture", None)
            if architecture is None:
                raise UserError(f"{self.config}: does not tell the size of the pictures; give --H and --W")
            size = architecture.resolution
        height, width = (size, size) if isinstance(size, int) else size
        return int(height) * factor, int(width) * factor

    @property
    def value_range(self) -> Range | None:
        """Return the values of black and white in the arrays and files of more than 8 bits that it was trained on."""
        return check_range(train_option(self.content, "value_range"))

    @property
    def channels(self) -> int:
        """Count the channels of the pictures."""
        return self.model.first_stage_model.in_channels

    @property
    def side_multiple(self) -> int:
        """Return the number that must divide the sides of a picture for first stage and denoiser."""
        return side_multiple(self.model)


def read_config(options: argparse.Namespace) -> dict[str, Any]:
    """Read the config that --run or --config names, as it stands."""
    return _read(find_files(options.run, options.config, options.ckpt)[0])


def is_first_stage(options: argparse.Namespace) -> bool:
    """Return whether --run or --config is an autoencoder, rather than a model that samples."""
    node = {key: without_checkpoints(read_config(options)["model"].get(key)) for key in ("target", "params")}
    return find_target(compat.translate_node(node, "model")["target"], "model") in (Autoencoder, AutoencoderTraining)


def train_option(content: dict[str, Any], name: str) -> Any:
    """Find a parameter of the training set, or of the data set which it wraps; None if the config does not have it."""
    node = ((content.get("data") or {}).get("params") or {}).get("train")
    while isinstance(node, dict):
        params = node.get("params") or {}
        if params.get(name) is not None:
            return params[name]
        node = params.get("dataset")
    return None


def load_model(options: argparse.Namespace, device: torch.device, overrides: Sequence[str] = ()) -> LoadedModel:
    """Load what --run, --config, --ckpt and --raw ask for, with overrides `model.key=value` of the config.

    UserError for absent files, other overrides, and weights that do not fit.
    """
    config_path, checkpoint_path = find_files(options.run, options.config, options.ckpt)
    content = _read(config_path, overrides)
    try:
        model = _build(content["model"])
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(config_path)) from error
    weights = "raw" if options.raw else "ema"
    checkpoint.load_into(model, checkpoint.choose(checkpoint.read(checkpoint_path), weights))
    return LoadedModel(model.eval().requires_grad_(False).to(device), config_path, checkpoint_path, weights, content)


@dataclass(frozen=True)
class LoadedFirstStage:
    """Hold an autoencoder in eval mode with where it came from; value_range as in `LoadedModel`."""

    autoencoder: Autoencoder
    config: Path
    checkpoint: Path
    weights: str
    value_range: Range | None = None

    def provenance(self) -> dict[str, str]:
        """Name the files, and the content of the weights by its SHA-256."""
        return _provenance(self.config, self.checkpoint, self.weights)


def _provenance(config_path: Path, checkpoint_path: Path, weights: str) -> dict[str, str]:
    with checkpoint_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    paths = {"config": str(config_path), "checkpoint": str(checkpoint_path)}
    return {**paths, "weights": weights, "checkpoint_sha256": digest}


def load_first_stage(options: argparse.Namespace, device: torch.device) -> LoadedFirstStage:
    """Load an autoencoder, that of a training or that inside of a latent diffusion model, by the same options."""
    config_path, checkpoint_path = find_files(options.run, options.config, options.ckpt)
    content = _read(config_path)
    weights = "raw" if options.raw else "ema"
    try:
        node, prefix = _first_stage_node(content["model"])
        autoencoder = config.instantiate(node, "model.params.autoencoder")
    except ConfigError as error:
        raise ConfigError(error.problem, error.path, str(config_path)) from error
    state = checkpoint.choose(checkpoint.read(checkpoint_path), weights)
    parts = tuple(f"{name}." for name, _ in autoencoder.named_children())
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    checkpoint.load_into(autoencoder, {name: tensor for name, tensor in state.items() if name.startswith(parts)})
    autoencoder = autoencoder.eval().requires_grad_(False).to(device)
    value_range = check_range(train_option(content, "value_range"))
    return LoadedFirstStage(autoencoder, config_path, checkpoint_path, weights, value_range)


def _first_stage_node(section: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Find the node of the autoencoder, and the beginning of its weights' names."""
    node = without_checkpoints({key: section.get(key) for key in ("target", "params")})
    node = without_checkpoints(compat.translate_node(node, "model"))
    target = find_target(node["target"], "model")
    if target is Autoencoder:
        return node, ""
    if target not in (AutoencoderTraining, LatentDiffusion):
        raise ConfigError(f"is {node['target']}; a first stage is an AutoencoderTraining", "model.target")
    inner = node["params"]["autoencoder"]
    if find_target(inner["target"], "model.params.autoencoder") is not Autoencoder:
        raise ConfigError("this model works on pixels; it has no first stage", "model.params.autoencoder.target")
    return inner, "first_stage_model." if target is LatentDiffusion else ""


def find_files(run: str | None, config_path: str | None, ckpt: str | None) -> tuple[Path, Path]:
    """Find config and checkpoint. UserError says what is missing and where it was looked for."""
    if run is None and ckpt is None:
        hint = "; weights are needed beside --config" if config_path else ""
        raise UserError(f"no model: give --run FOLDER, or --config YAML with --ckpt FILE{hint}")
    found = checkpoint.locate(ckpt if ckpt is not None else run)
    if config_path is not None:
        return Path(config_path), found
    beside = config_of_run(run if run is not None and Path(run).is_dir() else found)
    if beside is None:
        raise UserError(f"{found}: no {' or '.join(CONFIGS_OF_RUNS[:2])} beside it; give --config YAML")
    return beside, found


def _read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config as it stands: the data that it was trained on need neither be there nor be known."""
    if wrong := [word for word in overrides if not word.startswith("model.")]:
        raise UserError(f"{wrong[0]}: has no effect on samples; override model.key=value")
    content = compat.read(path, overrides)
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: has no section model")
    return content


def _build(section: dict[str, Any]) -> LatentDiffusion:
    # The checkpoint holds all weights, so those that training started from need not be there any more; what else stands
    # beside target and params is about training.
    node = {key: without_checkpoints(section.get(key)) for key in ("target", "params")}
    node = compat.translate_node(node, "model")
    if find_target(node["target"], "model") is not LatentDiffusion:
        raise ConfigError(f"is {node['target']}; samples need a LatentDiffusion", "model.target")
    return config.instantiate(node, "model", ema_decay=None)


def without_checkpoints(node: Any) -> Any:
    """Strip a node and those inside it of the weights that they would start from."""
    if isinstance(node, list):
        return [without_checkpoints(child) for child in node]
    if not isinstance(node, dict):
        return node
    dropped = ("checkpoint", "ignore_keys") if "target" in node else ()
    return {key: without_checkpoints(child) for key, child in node.items() if key not in dropped}
