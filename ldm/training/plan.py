"""What will be trained, known before anything is built: resolved config, devices, global batch, learning rate.

model:      target, params, checkpoint, ignore_keys: what is trained
training:   target, params, checkpoint, ignore_keys: how it is trained
            learning_rate: of a step, as it is; global_batch: the one that it was chosen for
            base_learning_rate: per sample, in place of learning_rate (CompVis configs)
            allow_untrained_first_stage: true lets a latent model start on a first stage without weights
data:       target, params
lightning:  trainer: arguments of Lightning's Trainer
            callbacks: by name; image_logger, progress and diagnosis are there unless null
            modelcheckpoint: params of ldm.training.lightning_fixes.checkpoints.Checkpoints, or another target
            logger: one node, or several by name, in addition to metrics.csv
            channels_last: true or false (default: on CUDA, where Triton normalises such images)
            compile: true, or {mode, dynamic} of torch.compile; cache_latents: true, or {views, half, folder, rows}
            float32_matmul_precision: highest, high (TF32) or medium
            max_skipped_steps: more steps in a row (10) without finite gradients end the run
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.bounds import Count
from ldm.config.nodes import is_node, join, walk
from ldm.config.parameters import parameters_of
from ldm.config.places import check_places
from ldm.config.plain import plain, with_references
from ldm.config.targets import did_you_mean, find_target
from ldm.config.types import fits, hints_of, mismatch
from ldm.data.core.latents import CacheSettings
from ldm.errors import ConfigError, UserError, shown
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.training.compilation import Compilation
from ldm.training.devices import Devices, choose
from ldm.training.extensions import check_extensions
from ldm.training.launch import Launch, check_by_hand, detect
from ldm.training.learning_rate import GlobalBatch, learning_rate
from ldm.training.run_folder import RunFolder
from ldm.training.strategies import STRATEGIES
from ldm.weights.load import is_network_alone, read

Settings = TypeVar("Settings")
_LIGHTNING_KEYS = (
    "trainer", "logger", "modelcheckpoint", "callbacks", "channels_last", "compile", "cache_latents",
    "float32_matmul_precision",
    "max_skipped_steps",
)  # fmt: skip
_KINDS = dict.fromkeys(("trainer", "callbacks", "modelcheckpoint", "logger"), dict | None) | {
    "channels_last": bool | None, "compile": bool | dict | None, "max_skipped_steps": Count | None,
    "float32_matmul_precision": Literal["highest", "high", "medium"] | None,
}  # fmt: skip
_MADE_HERE = ("callbacks", "logger", "default_root_dir", "enable_checkpointing", "enable_model_summary")
_COUNTS = (
    "num_nodes", "max_steps", "max_epochs", "min_steps", "min_epochs", "accumulate_grad_batches", "log_every_n_steps",
    "check_val_every_n_epoch",
)  # fmt: skip
_SHARES = (
    "val_check_interval", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
    "overfit_batches",
)  # fmt: skip
_ABOVE_ZERO = ("val_check_interval", "limit_train_batches")
_ENDLESS = ("max_steps", "max_epochs")  # -1: without limit
_ONE_SAMPLE = {"params": {"batch_size": 1}}
MISSING = "missing; a config has the sections model, training, data and lightning"
_WITHOUT_WEIGHTS = "IdentityAutoencoder"


@dataclass(frozen=True)
class RunOptions:
    """Settings of one run that win over its config; None leaves the config's.

    Args:
        gpus, devices, accelerator: which devices, see `ldm.training.devices.choose`.
        num_nodes, strategy, precision, max_steps: arguments of Lightning's Trainer.
        scale_lr: whether the learning rate is scaled with the global batch, see `ldm.training.learning_rate`.
    """

    gpus: str | None = None
    devices: str | None = None
    accelerator: str | None = None
    num_nodes: int | None = None
    strategy: str | None = None
    precision: str | None = None
    max_steps: int | None = None
    scale_lr: bool | None = None

    def of_trainer(self) -> dict[str, str | int]:
        """Return what replaces arguments of the Trainer."""
        names = ("num_nodes", "strategy", "precision", "max_steps")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


AS_CONFIGURED = RunOptions()


@dataclass(frozen=True)
class Plan:
    """The resolved config of a run (plain dicts by section) with what follows from it.

    written: the same config as the run folder keeps it, in which references within the data are references.
    """

    config: dict[str, Any]
    written: dict[str, Any]
    run: RunFolder
    devices: Devices
    batch: GlobalBatch
    learning_rate: float
    seed: int
    launch: Launch | None = None

    @property
    def strategy(self) -> str | dict[str, Any]:
        """Return the strategy: as configured (a name, or a node that builds one), else ddp for several processes."""
        return self.lightning["trainer"].get("strategy") or ("ddp" if self.batch.processes > 1 else "auto")

    @property
    def channels_last(self) -> bool:
        """Return whether images lie channels last in memory: as configured, else where that is faster."""
        given = self.lightning.get("channels_last")
        return self.devices.normalises_channels_last and not self.shards_weights if given is None else given

    @property
    def shards_weights(self) -> bool:
        """Return whether the strategy is fsdp."""
        name = self.strategy.get("target") if isinstance(self.strategy, dict) else self.strategy
        return str(name).endswith(("fsdp", "FullySharded"))

    def check_machine(self) -> None:
        """Raise UserError if this machine lacks devices or their precision, or the first host's address is unknown."""
        self.devices.check()
        self.devices.check_precision(str(self.lightning["trainer"].get("precision", 32)))
        if self.launch is None:
            check_by_hand(os.environ, self.batch.nodes)

    @property
    def lightning(self) -> dict[str, Any]:
        """Return the section `lightning`."""
        return self.config["lightning"]

    @property
    def model(self) -> dict[str, Any]:
        """Return the section `model`."""
        return self.config["model"]

    @property
    def training(self) -> dict[str, Any]:
        """Return the section `training`."""
        return self.config["training"]


def make_plan(
    config: Mapping[str, Any] | DictConfig,
    run: RunFolder,
    seed: int | None = None,
    options: RunOptions = AS_CONFIGURED,
    needs_data: bool = True,
) -> Plan:
    """Resolve and check everything that can be checked without building. Writes nothing.

    Args:
        config: sections model, training, data and (optional) lightning, in native names.
        run: folder of the run, new or resumed.
        seed: None takes that of the resumed run, else 23.
        options: what wins over the config.
        needs_data: whether the section data has to be there; without it the plan is for one sample a device.

    Raises UserError.
    """
    given = config if isinstance(config, DictConfig) else OmegaConf.create(config)
    config, seed = plain(given), run.seed(seed)
    if not 0 <= seed < 2**64:
        raise ConfigError(f"{seed} is no whole number from 0 to 2^64 - 1", "--seed")
    for section in ("model", "training", "data"):
        if section not in config and (needs_data or section != "data"):
            raise ConfigError(MISSING, section)
    _check_kinds(config.get("lightning"))
    lightning = config.get("lightning") or {}
    _check_keys(lightning, _LIGHTNING_KEYS, "lightning")
    cache_settings(lightning)
    compilation(lightning)
    _check_kept(config, run)
    trainer = (lightning.get("trainer") or {}) | options.of_trainer()
    launch = detect(os.environ)
    devices = choose(options.gpus, options.devices, options.accelerator, trainer, launch)
    if launch is not None:
        launch.check(None, options.num_nodes)
        trainer["num_nodes"] = launch.nodes
    _check_trainer(trainer)
    data = {"data": config["data"]} if "data" in config else {}
    for section in data.values():
        _seed_data(section, seed, run)
    batch = _global_batch(data.get("data", _ONE_SAMPLE), trainer, devices)
    rate = learning_rate(config["training"], batch.total, options.scale_lr)
    training = {key: value for key, value in config["training"].items() if key != "base_learning_rate"}
    training |= {"learning_rate": rate, "global_batch": batch.total}
    lightning["trainer"] = trainer | {"accelerator": devices.accelerator, "devices": devices.devices}
    if not run.is_new:
        check_places(lightning, run.path)
    check_extensions(lightning, run)
    resolved = {"model": config["model"], "training": training, **data, "lightning": lightning}
    written = with_references(resolved, OmegaConf.to_container(given))
    plan = Plan(resolved, written, run, devices, batch, rate, seed, launch)
    if plan.channels_last and plan.shards_weights:
        problem = "fsdp shards contiguous weights only; set it to false, or use ddp or zero1"
        raise ConfigError(problem, "lightning.channels_last")
    return plan


def lightning_hints() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of the section `lightning` and of `lightning.trainer`, with their annotations or None."""
    trainer = hints_of(pl.Trainer)
    names = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name not in ("self", *_MADE_HERE)]
    return {name: _KINDS.get(name) for name in _LIGHTNING_KEYS}, {name: trainer.get(name) for name in names}


def _check_kinds(section: Any) -> None:
    """Check of what kind the section and its parts are, before they are read."""
    if problem := mismatch(section, dict | None):
        raise ConfigError(problem, "lightning")
    for key, kind in _KINDS.items():
        if problem := mismatch((section or {}).get(key), kind):
            raise ConfigError(problem, f"lightning.{key}")


def cache_settings(lightning: Mapping[str, Any]) -> CacheSettings | None:
    """Return how the training set is cached, None if it is not. Raises ConfigError."""
    value = lightning.get("cache_latents")
    if not value:
        return None
    return _settings(CacheSettings, value, "lightning.cache_latents", "{views: 4, half: true, folder: PATH, rows: 99}")


def compilation(lightning: Mapping[str, Any]) -> Compilation | None:
    """Return how networks are compiled, None if they are not. Raises ConfigError."""
    value = lightning.get("compile")
    if not value:
        return None
    return _settings(Compilation, value, "lightning.compile", "{mode: max-autotune-no-cudagraphs, dynamic: false}")


def _settings(cls: type[Settings], value: Any, path: str, example: str) -> Settings:
    """Return settings of `true` or of a mapping of fields. Raises ConfigError."""
    given, hints = {} if value is True else value, hints_of(cls)
    if not isinstance(given, Mapping) or not all(name in hints and fits(given[name], hints[name]) for name in given):
        raise ConfigError(f"{value!r} is not understood; write true, or {example}", path)
    return cls(**given)


def _check_keys(section: Mapping[str, Any], known: tuple[str, ...], path: str) -> None:
    for key in section:
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; known are {', '.join(known)}"
            raise ConfigError(f"unknown{hint}", f"{path}.{key}")


def _check_kept(config: Mapping[str, Any], run: RunFolder) -> None:
    """Raise ConfigError for what a run that goes on would not do: read other weights, change lengths of averages."""
    if run.is_new:
        return
    before = run.saved_content() or {}
    weights, lengths = dict(_weights(before)), _averages(before)
    for path, name in _weights(config):
        if name != weights.get(path):
            problem = f"{shown(name, 80)} would not be read: a run that goes on has its weights in its checkpoint"
            raise ConfigError(f"{problem}; leave it out, or start a new run", path)
    for name, length in _averages(config).items():
        if name in lengths and length != lengths[name]:
            problem = f"{length} asked for, but the average was begun with {lengths[name]}; keep it, or start a new run"
            raise ConfigError(problem, f"training.params.averages.{name}")


def _averages(config: Mapping[str, Any]) -> dict[str, Any]:
    params = (config.get("training") or {}).get("params") or {}
    return dict(params.get("averages") or {})


def _weights(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the files of weights that a config names, with their places."""
    for path, value in walk({name: config[name] for name in ("model", "training") if name in config}):
        if isinstance(value, dict) and isinstance(value.get("checkpoint"), str):
            yield join(path, "checkpoint"), value["checkpoint"]


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    """Check names and types of the trainer's arguments, and what Lightning would only find out much later."""
    _, hints = lightning_hints()
    _check_keys(trainer, tuple(hints), "lightning.trainer")
    for name, value in trainer.items():
        place = f"lightning.trainer.{name}"
        if not is_node(value) and value != -1 and (problem := mismatch(value, hints[name] or object)):
            raise ConfigError(problem, place)
        if name in _COUNTS and value is not None and value < (-1 if name in _ENDLESS else 1):
            raise ConfigError(f"{value} is less than 1", place)
        if name in _ABOVE_ZERO and isinstance(value, int | float) and not value > 0:
            raise ConfigError(f"{value!r} is not above 0; leave it out for the whole epoch", place)
        if name == "gradient_clip_val" and value is not None and not value >= 0:
            raise ConfigError(f"{value!r} is not 0 (no clipping) or more", place)
        if name in _SHARES and isinstance(value, int | float) and (value < 0 or type(value) is float and value > 1):
            raise ConfigError(f"{value!r} is neither a share, 0.0 to 1.0, nor a count, a whole number", place)
    strategy, precision = trainer.get("strategy") or "auto", str(trainer.get("precision", 32))
    if isinstance(strategy, str) and strategy not in ("auto", *STRATEGIES):
        hint = did_you_mean(strategy, STRATEGIES) or f"; known are auto, {', '.join(STRATEGIES)}"
        raise ConfigError(f"{strategy!r} is unknown{hint}", "lightning.trainer.strategy")
    if precision.startswith("transformer-engine"):
        raise ConfigError(f"{precision} needs layers that the networks do not have; use bf16-mixed", "--precision")
    if strategy == "fsdp" and precision.startswith("16"):
        raise ConfigError("16-mixed needs a gradient scaler, which fsdp has not; use bf16-mixed", "--precision")


def _seed_data(data: dict[str, Any], seed: int, run: RunFolder) -> None:
    """Use the seed of the run for the order of the data, unless the config sets one that is not the run's earlier."""
    params = data.get("params") or {}
    if "seed" in parameters_of(find_target(data["target"], "data")).names:
        is_earlier = not run.is_new and params.get("seed") == run.environment().get("seed")
        data["params"] = params | {"seed": seed} if is_earlier else {"seed": seed, **params}


def _global_batch(data: Mapping[str, Any], trainer: Mapping[str, Any], devices: Devices) -> GlobalBatch:
    per_device = (data.get("params") or {}).get("batch_size")
    if type(per_device) is not int or per_device < 1:
        raise ConfigError("give a whole number, 1 or more", "data.params.batch_size")
    return GlobalBatch(
        per_device, devices.count, trainer.get("num_nodes", 1), trainer.get("accumulate_grad_batches", 1)
    )


def untrained_first_stage(plan: Plan) -> bool:
    """Return whether a new latent model would be trained on a first stage with random weights."""
    model = plan.model
    target = find_target(model["target"], "model")
    if not (isinstance(target, type) and issubclass(target, LatentDiffusion)):
        return False
    first_stage = model["params"].get("autoencoder") or {}
    if str(first_stage.get("target", "")).endswith(_WITHOUT_WEIGHTS) or not plan.run.is_new:
        return False
    return not (first_stage.get("checkpoint") or any(map(_brings_first_stage, (model, plan.training))))


def _brings_first_stage(node: Mapping[str, Any]) -> bool:
    """Return whether a node starts from more than a network; what cannot be read is told where it is needed."""
    if not node.get("checkpoint"):
        return False
    try:
        return not is_network_alone(read(node["checkpoint"]))
    except UserError:
        return True
