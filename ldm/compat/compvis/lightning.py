"""The section `lightning` as CompVis configs write it -> ours. Dicts and strings only."""

import logging
from collections.abc import Mapping
from typing import Any

from ldm.compat.compvis.params import Params

log = logging.getLogger(__name__)

_IMAGE_LOGGER = (
    "batch_frequency>every_n_steps", "max_images", "increase_log_steps>early_steps", "log_first_step>first_step",
)  # fmt: skip
_OF_THEIR_LOGGER = ("clamp", "rescale", "log_on_batch_idx", "log_images_kwargs")  # settled by ours
_CHECKPOINT = {"every_n_train_steps": "every_n_steps"}
# What their checkpoints are called, where they go and how many stay is settled by ours.
_OF_THEIR_CHECKPOINTS = (
    "dirpath", "filename", "verbose", "save_last", "save_top_k", "save_weights_only", "period", "every_n_epochs",
    "auto_insert_metric_name", "save_on_train_epoch_end", "train_time_interval",
)  # fmt: skip
_MAPPINGS = ("callbacks", "modelcheckpoint", "logger", "trainer")
_OURS_ANYWAY = ("main.SetupCallback", "main.CUDACallback", "main.LearningRateMonitor")
_CHECKPOINT_CALLBACK = "pytorch_lightning.callbacks.ModelCheckpoint"
_TRAINSTEPS = "metrics_over_trainsteps_checkpoint"
_TRAINSTEPS_INTERVAL = 10000
# Options of Lightning 1 that are gone and change nothing that is learned.
_GONE = (
    "progress_bar_refresh_rate", "weights_summary", "flush_logs_every_n_steps", "checkpoint_callback",
    "prepare_data_per_node", "replace_sampler_ddp", "amp_backend", "weights_save_path", "terminate_on_nan",
)  # fmt: skip


# The strategy of several devices, which is chosen by --strategy, as theirs is by default.
_BESIDE_THE_TRAINER = ("find_unused_parameters", "strategy")


def translate(section: Any) -> Any:
    """Translate the section; what is ours already stays as it is, and so does what is no such section."""
    parts = (section.get(key) for key in _MAPPINGS) if isinstance(section, Mapping) else [section]
    if not all(isinstance(part, Mapping | None) for part in parts):
        return section
    section = dict(section or {})
    callbacks = dict(section.get("callbacks") or {})
    checkpoint = _checkpoint(section.get("modelcheckpoint"))
    if isinstance(callbacks.get(_TRAINSTEPS), Mapping):
        interval = _numbered_every(callbacks.pop(_TRAINSTEPS))
        checkpoint = checkpoint or {"params": {}}
        if isinstance(checkpoint["params"], Mapping):  # else it is refused later, as it is
            checkpoint["params"] = {**checkpoint["params"], "keep_every_n_steps": interval}
    kept = {name: node for name, node in callbacks.items() if not _is_ours_anyway(node)}
    section["callbacks"] = {name: _callback(name, node) for name, node in kept.items()}
    if checkpoint is not None:
        section["modelcheckpoint"] = checkpoint
    if "TestTube" in str((section.get("logger") or {}).get("target", "")):
        del section["logger"]
    trainer = dict(section.get("trainer") or {})
    if dropped := [key for key in _GONE if key in trainer]:
        log.info("lightning.trainer: dropped %s, which today's Lightning does not have", ", ".join(dropped))
    section["trainer"] = {key: value for key, value in trainer.items() if key not in _GONE}
    return {key: value for key, value in section.items() if key not in _BESIDE_THE_TRAINER}


def with_precision(section: Any, precision: str) -> dict[str, Any]:
    """Return the section with a precision of the training, unless it has one."""
    section = dict(section or {})
    return {**section, "trainer": {"precision": precision, **(section.get("trainer") or {})}}


def _is_ours_anyway(node: Any) -> bool:
    return isinstance(node, Mapping) and node.get("target") in _OURS_ANYWAY


def _callback(name: str, node: Any) -> Any:
    """Translate the picture logger; a node without target adjusts the default of the same name."""
    if not isinstance(node, Mapping) or node.get("target") != "main.ImageLogger":
        return node
    p = _params(node, name)
    translated = p.given(*_IMAGE_LOGGER)
    is_disabled = p.take("disabled", False)
    p.drop(*_OF_THEIR_LOGGER)
    p.close()
    return None if is_disabled else {"params": {"early_steps": True, **translated}}


def _numbered_every(node: Any) -> Any:
    """Return the interval of numbered checkpoints."""
    p = _params({"target": _CHECKPOINT_CALLBACK, **node}, _TRAINSTEPS)
    interval = p.take("every_n_train_steps", _TRAINSTEPS_INTERVAL)
    p.drop("monitor", "mode", *_OF_THEIR_CHECKPOINTS)
    p.close()
    return interval


def _params(node: Mapping[str, Any], name: str) -> Params:
    return Params(dict(node), f"lightning.callbacks.{name}", lambda value, path: value)


def _checkpoint(node: Any) -> dict[str, Any] | None:
    if not isinstance(node, Mapping):
        return node
    params = node.get("params") or {}
    if not isinstance(params, Mapping) or node.get("target", _CHECKPOINT_CALLBACK) != _CHECKPOINT_CALLBACK:
        return {**node, "params": params}
    kept = {_CHECKPOINT.get(key, key): value for key, value in params.items() if key not in _OF_THEIR_CHECKPOINTS}
    return {**{key: value for key, value in node.items() if key != "target"}, "params": kept}
