"""Configs of the first edition of this project, as its run folders hold them -> ours.

There the section `model` named a trainer, whose parameters were also those of the model; time was a `schedule` and what
the network predicts a `parameterization`. Strings only; nothing is imported.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# Modules that moved (one's own code may import them, see `ldm`), and classes that have another name.
MODULES = {
    "ldm.autoencoder.autoencoder": "ldm.models.autoencoder",
    "ldm.cli.sample_metrics": "ldm.training.sample_metrics",
    "ldm.data.annotations": "ldm.data.layout.annotations",
    "ldm.data.base": "ldm.data.core.base",
    "ldm.data.boxes": "ldm.data.layout.boxes",
    "ldm.data.captions": "ldm.data.readers.captions",
    "ldm.data.classes": "ldm.data.core.classes",
    "ldm.data.decoding": "ldm.data.core.decoding",
    "ldm.data.degradation": "ldm.data.image_pairs.degradation",
    "ldm.data.derived": "ldm.data.core.derived",
    "ldm.data.digits": "ldm.toy.digits",
    "ldm.data.embeddings": "ldm.data.readers.embeddings",
    "ldm.data.folders": "ldm.data.readers.folders",
    "ldm.data.imagenet": "ldm.data.readers.imagenet",
    "ldm.data.imagenet_synsets": "ldm.data.readers.imagenet_synsets",
    "ldm.data.inpainting": "ldm.data.image_pairs.inpainting",
    "ldm.data.kernels": "ldm.data.image_pairs.kernels",
    "ldm.data.latents": "ldm.data.core.latents",
    "ldm.data.layouts": "ldm.data.layout.layouts",
    "ldm.data.loader": "ldm.data.core.loader",
    "ldm.data.lsun": "ldm.data.readers.lsun",
    "ldm.data.masks": "ldm.data.image_pairs.masks",
    "ldm.data.module": "ldm.data.core.module",
    "ldm.data.neighbours": "ldm.data.readers.neighbours",
    "ldm.data.paired": "ldm.data.image_pairs.paired",
    "ldm.data.parquet": "ldm.data.readers.parquet",
    "ldm.data.pixels": "ldm.data.core.pixels",
    "ldm.data.sampler": "ldm.data.core.sampler",
    "ldm.data.shape_captions": "ldm.toy.captions",
    "ldm.data.shapes": "ldm.toy.shapes",
    "ldm.data.shards": "ldm.data.shards.shards",
    "ldm.data.streams": "ldm.data.shards.streams",
    "ldm.data.super_resolution": "ldm.data.image_pairs.super_resolution",
    "ldm.data.tar_samples": "ldm.data.shards.tar_samples",
    "ldm.data.thumbnails": "ldm.toy.thumbnails",
    "ldm.data.transforms": "ldm.data.core.transforms",
    "ldm.evaluation.digit_classifier": "ldm.toy.digit_classifier",
    "ldm.evaluation.scene_detector": "ldm.toy.scene_detector",
    "ldm.evaluation.scene_network": "ldm.toy.scene_network",
    "ldm.evaluation.clip": "ldm.conditioning.clip",
    "ldm.evaluation.measures": "ldm.evaluation.distribution_metrics",
    "ldm.evaluation.picture_metrics": "ldm.evaluation.image_metrics",
    "ldm.networks.classifier": "ldm.networks.compvis_extras",
    "ldm.networks.rescaling": "ldm.networks.compvis_extras",
    "ldm.training.checkpoints": "ldm.training.lightning_fixes.checkpoints",
    "ldm.training.latent_scale": "ldm.models.latent_scale",
}
_CLASSES = {
    "ldm.training.latent_diffusion.LatentDiffusion": "ldm.training.latent_diffusion.DiffusionTraining",
    "ldm.training.diagnosis.Diagnosis": "ldm.training.diagnosis.AdversarialWarnings",
    "ldm.evaluation.extractors.SceneNet": "ldm.toy.scene_extractor.SceneNet",
    "ldm.evaluation.picture_metrics.ClipScore": "ldm.evaluation.condition_metrics.ClipScore",
    "ldm.diffusion.parameterization.Epsilon": "ldm.diffusion.prediction.Epsilon",
    "ldm.diffusion.parameterization.Sample": "ldm.diffusion.prediction.Sample",
    "ldm.diffusion.parameterization.Velocity": "ldm.diffusion.prediction.Velocity",
}
_PARAMS = {
    "ldm.data.shards.Shards": {"lanes": "shuffle_streams"},
    **dict.fromkeys(
        ("ldm.sampling.ddim.DDIM", "ldm.sampling.dpm_solver.DPMSolver", "ldm.sampling.plms.PLMS"), {"spacing": "grid"}
    ),
}
_SCHEDULE, _PROCESS = "ldm.diffusion.schedule.Schedule.", "ldm.diffusion.discrete.DiscreteVP."
_OF_THE_MODEL = ("network", "autoencoder", "conditioner", "latent_scale", "image_key")
_RENAMED = {"schedule": "process", "parameterization": "prediction"}
_OF_THE_OBJECTIVE = ("learn_logvar", "logvar_init")
_OF_A_TRAINING = ("learning_rate", "base_learning_rate", "global_batch", "allow_untrained_first_stage")
_DIFFUSION = "ldm.training.latent_diffusion.LatentDiffusion"
_AUTOENCODER = "ldm.training.autoencoder.AutoencoderTraining"


def is_old(config: Config) -> bool:
    """Return whether a config was written for the first edition."""
    model = config.get("model")
    return isinstance(model, dict) and "training" not in config and model.get("target") in (_DIFFUSION, _AUTOENCODER)


def translate(config: Config) -> Config:
    """Translate a whole config; one of today is returned as it is."""
    if not is_old(config):
        return config
    model = config["model"]
    params = dict(model.get("params") or {})
    split = _split_diffusion if model["target"] == _DIFFUSION else _split_autoencoder
    node, training = split(params)
    training |= {key: model[key] for key in _OF_A_TRAINING if key in model}
    if "checkpoint" in model:
        training |= {key: model[key] for key in ("checkpoint", "ignore_keys") if key in model}
    sections = {"model": node, "training": training}
    return {**sections, **{key: moved(value) for key, value in config.items() if key != "model"}}


def _split_diffusion(params: Config) -> tuple[Config, Config]:
    of_model = {_RENAMED.get(key, key): moved(params.pop(key)) for key in list(params) if _is_of_model(key)}
    of_objective = {key: params.pop(key) for key in _OF_THE_OBJECTIVE if key in params}
    of_training = moved(params)
    if of_objective:
        objective = of_training.get("objective") or {"target": "ldm.diffusion.objective.Objective"}
        of_training["objective"] = {**objective, "params": {**(objective.get("params") or {}), **of_objective}}
    return (
        {"target": "ldm.models.latent_diffusion.LatentDiffusion", "params": of_model},
        {"target": "ldm.training.latent_diffusion.DiffusionTraining", "params": of_training},
    )


def _is_of_model(key: str) -> bool:
    return key in _OF_THE_MODEL or key in _RENAMED


def _split_autoencoder(params: Config) -> tuple[Config, Config]:
    autoencoder = moved(params.pop("autoencoder"))
    return autoencoder, {"target": _AUTOENCODER, "params": moved(params)}


def moved(value: Any) -> Any:
    """Give all targets below a value, and their parameters, the names that they have today."""
    if isinstance(value, list):
        return [moved(child) for child in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: moved(child) for key, child in value.items()}
    target = renamed.get("target")
    if isinstance(target, str):
        renamed["target"] = _target(target)
        if (names := _PARAMS.get(target)) and isinstance(renamed.get("params"), dict):
            renamed["params"] = {names.get(key, key): child for key, child in renamed["params"].items()}
    return renamed


def _target(target: str) -> str:
    if target.startswith(_SCHEDULE):
        return _PROCESS + target.removeprefix(_SCHEDULE)
    if target in _CLASSES:
        return _CLASSES[target]
    module, _, name = target.rpartition(".")
    return f"{MODULES[module]}.{name}" if module in MODULES else target
