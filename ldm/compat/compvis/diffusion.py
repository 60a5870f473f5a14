"""CompVis diffusion models -> ours: DDPM, LatentDiffusion, learning-rate schedules."""

from typing import Any

from ldm.compat.compvis.conditioning import conditioner, inpainting_conditioner
from ldm.compat.compvis.first_stage import AUTOENCODERS, IDENTITY, first_stage, with_weights
from ldm.compat.compvis.params import Node, Params, Translate, node, renaming, unavailable

_EMA_DECAY = 0.9999
_PROCESS = "ldm.diffusion.discrete.DiscreteVP"
_NO_AUTOENCODER = "ldm.models.autoencoder.IdentityAutoencoder"
_LR = "ldm.training.lr_schedules"
_PREDICTION = "ldm.diffusion.prediction"
# What a checkpoint holds beside the U-Net and its average.
_NOT_THE_UNET = (
    "betas", "alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_", "logvar", "scale_factor",
    "first_stage_model", "cond_stage_model",
)  # fmt: skip


def _process(p: Params) -> Node:
    kind = p.choose("beta_schedule", "linear", {name: name for name in ("linear", "sqrt_linear", "sqrt", "cosine")})
    steps, weight = p.take("timesteps", 1000), p.take("v_posterior", 0.0)
    start, end, s = p.take("linear_start", 1e-4), p.take("linear_end", 2e-2), p.take("cosine_s", 8e-3)
    given = p.take("given_betas", None)
    if given is not None:
        return node(f"{_PROCESS}.from_betas", betas=given, posterior_weight=weight)
    if kind == "cosine":
        return node(f"{_PROCESS}.cosine", num_steps=steps, s=s, posterior_weight=weight)
    return node(f"{_PROCESS}.{kind}", num_steps=steps, start=start, end=end, posterior_weight=weight)


def _model(p: Params) -> dict[str, Any]:
    """Translate what the models of DDPM and LatentDiffusion have in common."""
    target = p.choose("parameterization", "eps", {"eps": "Epsilon", "x0": "Sample", "v": "Velocity"})
    key = p.take("first_stage_key", "image")
    size = p.take("image_size", None)
    named = {"process": _process(p), "prediction": node(f"{_PREDICTION}.{target}"), "image_key": key}
    return named if size is None else {**named, "latent_size": size}


def _training(p: Params) -> dict[str, Any]:
    """Translate what the trainings of DDPM and LatentDiffusion have in common."""
    params = {
        "objective": node(
            "ldm.diffusion.objective.Objective",
            loss=p.choose("loss_type", "l2", {"l1": "l1", "l2": "l2"}),
            simple_weight=p.take("l_simple_weight", 1.0),
            elbo_weight=p.take("original_elbo_weight", 0.0),
            **p.given("learn_logvar", "logvar_init"),
        ),
        "ema_decay": _EMA_DECAY if p.take("use_ema", True) else None,
    }
    if p.peek("scheduler_config") is not None:
        params["optimization"] = node("ldm.training.optimization.Optimization", schedule=p.child("scheduler_config"))
    p.only("use_positional_encodings", False, "it never worked in the original")
    p.drop("scheduler_config", "monitor", "channels", "log_every_t", "clip_denoised")
    p.off("reset_ema", "reset_num_ema_updates", "make_it_fit", "ucg_training")
    return params


def _finish(model: dict[str, Any], p: Params) -> Node:
    inner = node("ldm.models.latent_diffusion.LatentDiffusion", **model)
    built = with_weights(node("ldm.training.latent_diffusion.DiffusionTraining", model=inner, **_training(p)), p)
    if p.take("load_only_unet", False) and "checkpoint" in built:
        built["ignore_keys"] = [*built.get("ignore_keys", ()), *_NOT_THE_UNET]
    return built


def ddpm(p: Params) -> Node:
    """Translate DDPM: diffusion on pixels is latent diffusion with an autoencoder that does nothing."""
    p.only("conditioning_key", None, "DDPM has no conditioning; use LatentDiffusion")
    params = {
        "network": p.child("unet_config"),
        "autoencoder": node(_NO_AUTOENCODER, channels=p.peek("channels", 3)),
        **_model(p),
    }
    return _finish(params, p)


def latent_inpainting(p: Params) -> Node:
    """Translate LatentInpaintDiffusion, the inpainting of Stable Diffusion 1.5 and 2."""
    condition = inpainting_conditioner(p)
    p.drop("finetune_keys", "keep_finetune_dims", "keep_dims", "c_concat_log_start", "c_concat_log_end")
    return latent_diffusion(p, condition)


def latent_diffusion(p: Params, condition: Node | None = None) -> Node:
    """Translate LatentDiffusion; the conditioner also depends on what the U-Net and the first stage expect."""
    condition = condition or conditioner(p)
    p.off("force_null_conditioning")
    params = {"network": p.child("unet_config"), "autoencoder": _first_stage(p)}
    if condition is not None:
        params["conditioner"] = condition
    params["latent_scale"] = _latent_scale(p)
    p.only("num_timesteps_cond", 1, "noising the conditioning (a shortened schedule for it) is not implemented")
    return _finish({**params, **_model(p)}, p)


def _first_stage(p: Params) -> Node:
    config = p.peek("first_stage_config")
    if not isinstance(config, dict | None):
        raise p.error("first_stage_config", "must be a node with a target")
    target = (config or {}).get("target")
    if target == IDENTITY:
        p.drop("first_stage_config")
        return node(_NO_AUTOENCODER, channels=p.peek("channels", 3))
    return p.child("first_stage_config", using=first_stage if target in AUTOENCODERS else None)


def layout_to_image(p: Params) -> Node:
    """Translate Layout2ImgDiffusion, whose only difference is another default for cond_stage_key and a picture."""
    return latent_diffusion(p.with_default("cond_stage_key", "coordinates_bbox"))


def _latent_scale(p: Params) -> float | str:
    factor, measured = p.take("scale_factor", 1.0), p.take("scale_by_std", False)
    if measured and factor != 1.0:
        raise p.error("scale_factor", "is measured with scale_by_std; leave one of them out")
    return "measure" if measured else factor


_CLASSIFIER = "its training calls what was never released; its network is ldm.networks.compvis_extras.EncoderUNet"
_SAMPLER = "it is no part of a config; samplers are ldm.sampling.ddim.DDIM, ldm.sampling.plms.PLMS and others"

TABLE: dict[str, Translate] = {
    "ldm.models.diffusion.ddpm.DDPM": ddpm,
    "ldm.models.diffusion.ddpm.LatentDiffusion": latent_diffusion,
    "ldm.models.diffusion.ddpm.Layout2ImgDiffusion": layout_to_image,
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": latent_inpainting,
    "ldm.models.diffusion.classifier.NoisyLatentImageClassifier": unavailable(_CLASSIFIER),
    "ldm.models.diffusion.ddim.DDIMSampler": unavailable(_SAMPLER),
    "ldm.models.diffusion.plms.PLMSSampler": unavailable(_SAMPLER),
    "ldm.modules.ema.LitEma": unavailable("it is no part of a config; set use_ema"),
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler": renaming(
        f"{_LR}.WarmUpCosine", "warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps",
        drop=("verbosity_interval",),
    ),
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler2": renaming(
        f"{_LR}.WarmUpCosineCycles", "warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths",
        drop=("verbosity_interval",),
    ),
    "ldm.lr_scheduler.LambdaLinearScheduler": renaming(
        f"{_LR}.WarmUpLinear", "warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths",
        drop=("verbosity_interval",),
    ),
}  # fmt: skip
