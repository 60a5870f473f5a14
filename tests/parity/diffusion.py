"""Adapters of the diffusion process and of the losses of both diffusion models."""

import torch

from ldm.diffusion.objective import ERRORS
from ldm.diffusion.prediction import Epsilon, Sample

from .case import Case
from .latent import conditioning, images_first
from .networks import gradient_norms, only_slot


def schedule(case: Case, tmp_path) -> dict:
    case.allow_args("given_betas")
    extra = {"given_betas": case.inputs["betas"].tolist()} if case.args.get("given_betas") else {}
    model = case.model(**extra)
    return model.schedule.buffers() | {"lvlb_weights": model.vlb_weights, "logvar": model.logvar}


def ddpm_math(case: Case, tmp_path) -> dict:
    case.allow_args()
    model = case.model()
    process, x, noise, t = model.schedule, case.inputs["x"], case.inputs["noise"], case.inputs["t"]
    error = ERRORS[model.objective.loss](x - noise)
    return {
        "q_sample": process.diffuse(x, t, noise),
        "q_sample_tape": process.diffuse(x, t, case.tape().take("q_sample")),
        "q_mean_variance": process.diffusion_moments(x, t),
        "q_posterior": process.posterior(x, noise, t),
        "pred_start": Epsilon().predict(process, noise, x, t).x0,
        "pred_eps": Sample().predict(process, noise, x, t).eps,
        "prior_bpd": process.prior_bits_per_dim(x),
        "get_loss_False": error,
        "get_loss_True": error.mean(),
    }


def published_logs(logs: dict, split: str) -> dict:
    """Prefix the names with the split, as the reference logs all but the learned variance."""
    return {name if name == "logvar" else f"{split}/{name}": value for name, value in logs.items()}


def p_losses(case: Case, tmp_path) -> dict:
    case.allow_args("cond", "train")
    train = bool(case.args.get("train"))
    model = case.model().train(train)
    x, t = case.inputs["x"], case.inputs["t"]
    cond = conditioning(case, case.args.get("cond"))
    loss, logs = model.loss(x, cond, t, case.inputs["noise"])
    loss.backward()
    with torch.no_grad():
        output = model.model(x, t, cond)
    return {
        "loss": loss,
        "log": published_logs(logs, "train" if train else "val"),
        "grad_norms": gradient_norms(model),
        "apply_model": output,
    }


def forward_loss(case: Case, tmp_path) -> dict:
    case.allow_args()
    model, tape = case.model(), case.tape()
    raw = {name.removeprefix("batch."): value for name, value in case.inputs.items()}
    batch = {name: images_first(value) for name, value in raw.items()}
    z = model.latents(batch, tape.noise("sample"))
    loss, logs = model.loss(z, model.condition(batch), tape.take("forward"), tape.take("p_losses"))
    loss.backward()
    again = model.latents(batch, tape.noise("sample"))
    if model.cond_stage_model is not None:
        again = [again, _raw_conditioning(case, model, raw, batch)]
    elif "input.0" in case.outputs:  # the latent model returns a list, the pixel model a tensor
        again = [again]
    return {"loss": loss, "log": published_logs(logs, "val"), "grad_norms": gradient_norms(model), "input": again}


def _raw_conditioning(case: Case, model, raw: dict, batch: dict):
    """Give what the reference hands to its loss: the raw value if the conditioner is trained, else its output."""
    if not case.params.get("cond_stage_trainable", False):
        return only_slot(model.condition(batch))
    key = case.params["cond_stage_key"]
    return raw if key == "class_label" else batch[key]


@torch.no_grad()
def first_stage(case: Case, tmp_path) -> dict:
    case.allow_args("std", "cids")
    model, noise = case.model(), case.tape().noise("sample")
    x, z = case.inputs["x"], case.inputs["z"]
    results = {
        "encoding": model.encode_images(x, noise),
        "decoded": model.decode_latents(z),
        "decoded_raw": model.decode_latents(z, quantize=False),
    }
    if case.args.get("cids"):
        indices = case.inputs["logits"].argmax(1)  # (B, H, W)
        quantizer = model.first_stage_model.quantize
        codes = quantizer.codes(indices.flatten(), (*indices.shape, quantizer.embedding.weight.shape[1]))
        results["decoded_cids"] = model.decode_latents(codes, quantize=False)
    if case.args.get("std"):
        model.measure_scale([{model.image_key: x}], noise)
        results |= {"scale_factor": model.scale_factor, "encoding_rescaled": model.encode_images(x, noise)}
    return results


@torch.no_grad()
def conditioner(case: Case, tmp_path) -> dict:
    case.allow_args("batch_key")
    model = case.model()
    key = case.args.get("batch_key") or case.params.get("cond_stage_key", "image")
    return {"cond": only_slot(model.condition({key: case.inputs["cond"]}))}


ADAPTERS = {
    "schedule": schedule,
    "ddpm_math": ddpm_math,
    "p_losses": p_losses,
    "forward_loss": forward_loss,
    "first_stage": first_stage,
    "conditioning": conditioner,
}
