"""The configs of Stability's generative-models (package sgm) -> ours, those of a discrete process.

Their networks and first stages are CompVis' under other names; new are a denoiser that scales inputs and outputs, where
here a process and a prediction stand, and a list of embedders, whose outputs lie beside each other in their channels.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from ldm.compat.compvis import conditioning, diffusion, encoder_decoder, first_stage, networks
from ldm.compat.compvis.params import Node, Params, Translate, apply, node, unavailable
from ldm.errors import ConfigError

_log = logging.getLogger(__name__)
_DIFFUSION, _ENCODERS = "sgm.modules.diffusionmodules", "sgm.modules.encoders.modules"
_SCALINGS = {f"{_DIFFUSION}.denoiser_scaling.{name}": kind for name, kind in
             (("EpsScaling", "Epsilon"), ("VScaling", "Velocity"))}  # fmt: skip
_WEIGHTINGS = (f"{_DIFFUSION}.denoiser_weighting.EpsWeighting", f"{_DIFFUSION}.loss_weighting.EpsWeighting")
_LEGACY = f"{_DIFFUSION}.discretizer.LegacyDDPMDiscretization"
_KL = "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"


def engine(p: Params) -> Node:
    """Translate DiffusionEngine."""
    network = p.child("network_config", using=partial(networks.unet, uses_transformers=_has_context(p)))
    model = {"network": network, "autoencoder": p.child("first_stage_config", using=_inner_first_stage)}
    if p.peek("conditioner_config") is not None:
        model["conditioner"] = p.child("conditioner_config", using=_conditioner)
    model |= _denoiser(p) | {"latent_scale": p.take("scale_factor", 1.0), "image_key": p.take("input_key", "jpg")}
    training: dict[str, Any] = {"ema_decay": p.take("ema_decay_rate", 0.9999) if p.take("use_ema", False) else None}
    if p.peek("scheduler_config") is not None:
        schedule = p.child("scheduler_config")
        training["optimization"] = node("ldm.training.optimization.Optimization", schedule=schedule)
    _check_loss(p)
    p.only("optimizer_config", None, "the optimiser is AdamW", {"target": "torch.optim.AdamW"})
    p.off("network_wrapper", "compile_model")
    p.drop(
        "conditioner_config", "scheduler_config", "sampler_config", "disable_first_stage_autocast", "log_keys",
        "no_cond_log", "en_and_decode_n_samples_a_time", "monitor",
    )  # fmt: skip
    inner = node("ldm.models.latent_diffusion.LatentDiffusion", **model)
    built = node("ldm.training.latent_diffusion.DiffusionTraining", model=inner, **training)
    return first_stage.with_weights(built, p)


def _has_context(p: Params) -> bool:
    """Return whether a network attends to a context: there no switch says so."""
    network = p.peek("network_config")
    params = network.get("params") if isinstance(network, dict) else None
    return isinstance(params, dict) and params.get("context_dim") is not None


def _inner_first_stage(p: Params) -> Node:
    if p.target == "sgm.models.autoencoder.AutoencodingEngine":
        return _encoding_engine(p)
    p.drop("input_key", "loss_config", "optimizer_config")
    return first_stage.first_stage(p)


def _denoiser(p: Params) -> dict[str, Node]:
    """Translate the denoiser into a process and a prediction."""
    target = _target(p, "denoiser_config")
    if target != f"{_DIFFUSION}.denoiser.DiscreteDenoiser":
        raise p.error("denoiser_config.target", f"{target} is not supported; only the DiscreteDenoiser")
    return p.child("denoiser_config", using=_discrete)["params"]


def _discrete(p: Params) -> Node:
    steps = p.take("num_idx")
    p.drop("do_append_zero", "quantize_c_noise", "flip")
    kind = _target(p, "scaling_config")
    if kind not in _SCALINGS:
        raise p.error("scaling_config.target", f"{kind} is not supported; only {' and '.join(_SCALINGS)}")
    if _target(p, "discretization_config") != _LEGACY:
        raise p.error("discretization_config.target", f"is not supported; only {_LEGACY}")
    weighting = _target(p, "weighting_config")
    if weighting not in (None, *_WEIGHTINGS):
        raise p.error("weighting_config.target", f"{weighting} is not supported; only {_WEIGHTINGS[0]}")
    p.drop("scaling_config", "weighting_config")
    process = p.child("discretization_config", using=partial(_discretization, steps=steps))
    prediction = node(f"ldm.diffusion.prediction.{_SCALINGS[kind]}")
    return node("", process=process, prediction=prediction)


def _discretization(p: Params, steps: int) -> Node:
    ends = {"start": p.take("linear_start", 0.00085), "end": p.take("linear_end", 0.012)}
    p.only("num_timesteps", steps, f"it has to be num_idx, {steps}")
    return node("ldm.diffusion.discrete.DiscreteVP.linear", num_steps=steps, **ends)


def _check_loss(p: Params) -> None:
    """Accept the loss that ours is: the squared error of what the network predicts, at uniform times."""
    loss = p.take("loss_fn_config", None) or {}
    params = loss.get("params") or {}
    for name, allowed in (
        ("loss_weighting_config", _WEIGHTINGS),
        ("sigma_sampler_config", (f"{_DIFFUSION}.sigma_sampling.DiscreteSampling",)),
    ):
        given = (params.get(name) or {}).get("target")
        if given not in (None, *allowed):
            raise p.error(f"loss_fn_config.params.{name}.target", f"{given} is not supported; only {allowed[-1]}")
    if params.get("loss_type", "l2") != "l2":
        raise p.error("loss_fn_config.params.loss_type", f"{params['loss_type']!r} is not supported; only l2")


def _target(p: Params, name: str) -> Any:
    value = p.peek(name)
    return value.get("target") if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------------- conditioning


def _conditioner(p: Params) -> Node | None:
    """Translate GeneralConditioner, also one of a single embedder: its weights are numbered."""
    if p.target.endswith("UnconditionalConfig"):
        return None
    embedders = p.take("emb_models")
    if not isinstance(embedders, list) or not all(isinstance(each, dict) for each in embedders):
        raise p.error("emb_models", "must be a list of embedders, each with a target")
    parts: dict[str, Node] = {}
    nulls = set()
    for index, embedder in enumerate(embedders):
        place = f"{p.at('emb_models')}[{index}]"
        part, null = _embedder(embedder, place, p)
        name = _name(part["target"])
        parts[name if name not in parts else f"{name}_{index}"] = part
        nulls |= {null} if null else set()
    if len(nulls) > 1:
        raise p.error("emb_models", "ucg_rate with and without legacy_ucg_value cannot be mixed")
    null = {"null": nulls.pop()} if nulls else {}
    return node("ldm.conditioning.base.StackedConditioner", **null, **parts)


def _name(target: str) -> str:
    return {"CLIPTextConditioner": "text", "ClassConditioner": "label", "SizeConditioner": "size"}[
        target.rpartition(".")[2]
    ]


def _embedder(embedder: Node, place: str, p: Params) -> tuple[Node, str | None]:
    """Translate one embedder; return with it what its dropped condition is, None for what is never dropped."""
    target = str(embedder.get("target"))
    if target not in _EMBEDDERS:
        raise ConfigError(f"{target} is not supported; only {', '.join(_EMBEDDERS)}", f"{place}.target")
    beside = dict(embedder)
    known = {"key": beside.pop("input_key", None), "trainable": beside.pop("is_trainable", False)}
    rate, value = beside.pop("ucg_rate", 0.0), beside.pop("legacy_ucg_value", None)
    if value not in (None, ""):
        raise ConfigError(f"{value!r} is not supported; only the empty text", f"{place}.legacy_ucg_value")
    wiring = conditioning.Wiring(key=known["key"], slot="context", trainable=known["trainable"], path=place)
    built = apply(partial(_EMBEDDERS[target], wiring=wiring), beside, place, p.translate)
    if rate:
        built["params"]["drop_rate"] = rate
    is_text = target in _TEXTS
    if known["trainable"] and is_text:
        built["params"]["trainable"] = True
    if rate and target.endswith("ClassEmbedder"):
        built["params"]["null_label"] = "zeros"
    if not rate or target.endswith("ConcatTimestepEmbedderND"):
        return built, None
    return built, "own" if value is not None else "zeros"


def _class_embedder(p: Params, wiring: conditioning.Wiring) -> Node:
    p.only("add_sequence_dim", True, "a label is a token of cross-attention")
    params = {"num_classes": p.take("n_classes", 1000), "embed_dim": p.take("embed_dim")}
    return node("ldm.conditioning.labels.ClassConditioner", **params, **wiring.params("key", "trainable"))


def _sizes(p: Params, wiring: conditioning.Wiring) -> Node:
    corner = {"is_corner": True} if "crop" in str(wiring.key) else {}
    params = {"key": wiring.key, "dim": p.take("outdim"), **corner}
    return node("ldm.conditioning.sizes.SizeConditioner", **params)


_TEXTS = {
    f"{_ENCODERS}.FrozenCLIPEmbedder": conditioning.clip_text,
    f"{_ENCODERS}.FrozenOpenCLIPEmbedder": conditioning.open_clip_text,
    f"{_ENCODERS}.FrozenOpenCLIPEmbedder2": conditioning.open_clip_text,
}
_EMBEDDERS = {
    **_TEXTS,
    f"{_ENCODERS}.ClassEmbedder": _class_embedder,
    f"{_ENCODERS}.ConcatTimestepEmbedderND": _sizes,
}


# -------------------------------------------------------------------------------------------------------- first stages


def _encoding_engine(p: Params) -> Node:
    """Translate AutoencodingEngine, which has no convolutions between networks and latents."""
    encoder, decoder = p.child("encoder_config", using=_half), p.child("decoder_config", using=_half)
    if encoder != decoder:
        raise p.error("decoder_config.params", "differ from those of the encoder, which is not supported")
    if _target(p, "regularizer_config") != _KL:
        raise p.error("regularizer_config.target", f"is not supported; only {_KL}")
    p.drop("regularizer_config", "loss_config", "input_key", "monitor", "optimizer_config", "disc_start_iter")
    arch = encoder["params"]["architecture"]
    params = {"architecture": arch, "regularizer": node("ldm.autoencoder.regularizers.KL")}
    params |= {"embed_dim": arch["params"]["z_channels"], "has_quant_convs": False}
    built = node("ldm.models.autoencoder.Autoencoder", **params)
    return first_stage.with_weights(built, p)


def _half(p: Params) -> Node:
    p.only("double_z", True, "a KL posterior has mean and variance")
    p.off("tanh_out", "give_pre_end")
    return node("", architecture=encoder_decoder.architecture(p, *encoder_decoder.ALL_OF_A_PAIR))


def training(p: Params) -> Node:
    """Translate an autoencoder that is to be trained."""
    loss = p.peek("loss_config") or p.peek("lossconfig")
    built = p.child("loss_config" if "loss_config" in p else "lossconfig") if loss else first_stage.no_loss(p)
    image_key, ema = p.take("input_key", "jpg"), p.take("ema_decay", None)
    inner = _inner_first_stage(p)
    model = {key: value for key, value in inner.items() if key in ("target", "params")}
    params = {"model": model, "loss": built, "image_key": image_key, "ema_decay": ema}
    beside = {key: value for key, value in inner.items() if key not in model}
    return node("ldm.training.autoencoder.AutoencoderTraining", **params) | beside


def kl_loss(p: Params) -> Node:
    """Translate GeneralLPIPSWithDiscriminator, whose weight of the KL term stands in a mapping."""
    weights = p.take("regularization_weights", {})
    if unknown := [name for name in weights if name != "kl_loss"]:
        raise p.error("regularization_weights", f"{unknown[0]} is not supported; only kl_loss")
    if p.take("learn_logvar", False):
        _log.warning("%s: learn_logvar is not supported; the weight of the reconstruction stays as it is", p.node_path)
    p.drop("scale_input_to_tgt_size", "dims")
    return first_stage.kl_loss(p.with_default("kl_weight", weights.get("kl_loss", 1.0)))


_AUTOENCODERS = ("AutoencodingEngine", "AutoencoderKL", "AutoencoderKLInferenceWrapper")
TABLE: dict[str, Translate] = {
    "sgm.models.diffusion.DiffusionEngine": engine,
    **{f"sgm.models.autoencoder.{name}": training for name in _AUTOENCODERS},
    f"{_DIFFUSION}.openaimodel.UNetModel": networks.unet,
    "sgm.modules.autoencoding.losses.GeneralLPIPSWithDiscriminator": kl_loss,
    "sgm.lr_scheduler.LambdaLinearScheduler": diffusion.TABLE["ldm.lr_scheduler.LambdaLinearScheduler"],
    "sgm.modules.diffusionmodules.denoiser.Denoiser": unavailable("its process is continuous"),
}
