"""Adapters of the diffusion process and of the losses of both diffusion models."""

import torch

from ldm.diffusion.prediction import Epsilon, Sample

from .case import Case
from .latent import conditioning, images_first
from .networks import gradient_norms, only_slot


def schedule(case: Case, tmp_path) -> dict:
    case.allow_args("given_betas")
    extra = {"given_betas": case.inputs["betas"].tolist()} if case.args.get("given_betas") else {}
    model = case.model(**extra)
    objective = model.objective
    return model.model.process.buffers() | {"lvlb_weights": objective.vlb_weights, "logvar": objective.logvar}


def ddpm_math(case: Case, tmp_path) -> dict:
    case.allow_args()
    model = case.model()
    process, x, noise, t = model.model.process, case.inputs["x"], case.inputs["noise"], case.inputs["t"]
    error, level = model.objective.error(x - noise), process.level(t)
    return {
        "q_sample": level.diffuse(x, noise),
        "q_sample_tape": level.diffuse(x, case.tape().take("q_sample")),
        "q_mean_variance": process.diffusion_moments(x, t),
        "q_posterior": process.posterior(x, noise, t),
        "pred_start": Epsilon().denoised(noise, x, level).x0,
        "pred_eps": Sample().denoised(noise, x, level).eps,
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
    training = case.model().train(train)
    x, t = case.inputs["x"], case.inputs["t"]
    cond = conditioning(case, case.args.get("cond"))
    terms = training.model.loss(x, cond, t, case.inputs["noise"], training.objective)
    terms.loss.backward()
    with torch.no_grad():
        output = training.model.model(x, t, cond)
    return {
        "loss": terms.loss,
        "log": published_logs(training.logs(terms), "train" if train else "val"),
        "grad_norms": gradient_norms(training),
        "apply_model": output,
    }


def forward_loss(case: Case, tmp_path) -> dict:
    case.allow_args()
    training, tape = case.model(), case.tape()
    model = training.model
    raw = {name.removeprefix("batch."): value for name, value in case.inputs.items()}
    batch = {name: images_first(value) for name, value in raw.items()}
    z = model.latents(batch, tape.noise("sample"))
    times, noise = tape.take("forward"), tape.take("p_losses")
    terms = model.loss(z, model.condition(batch), times, noise, training.objective)
    terms.loss.backward()
    again = model.latents(batch, tape.noise("sample"))
    if model.cond_stage_model is not None:
        again = [again, _raw_conditioning(case, model, raw, batch)]
    elif "input.0" in case.outputs:  # the latent model returns a list, the pixel model a tensor
        again = [again]
    logs = published_logs(training.logs(terms), "val")
    return {"loss": terms.loss, "log": logs, "grad_norms": gradient_norms(training), "input": again}


def _raw_conditioning(case: Case, model, raw: dict, batch: dict):
    """Give what the reference hands to its loss: the raw value if the conditioner is trained, else its output."""
    if not case.params.get("cond_stage_trainable", False):
        return only_slot(model.condition(batch))
    key = case.params["cond_stage_key"]
    return raw if key == "class_label" else batch[key]


@torch.no_grad()
def first_stage(case: Case, tmp_path) -> dict:
    case.allow_args("std", "cids")
    model, noise = case.model().model, case.tape().noise("sample")
    x, z = case.inputs["x"], case.inputs["z"]
    results = {
        "encoding": model.encode(x, noise),
        "decoded": model.decode(z),
        "decoded_raw": model.decode(z, quantize=False),
    }
    if case.args.get("cids"):
        indices = case.inputs["logits"].argmax(1)  # (B, H, W)
        quantizer = model.first_stage_model.quantize
        codes = quantizer.codes(indices.flatten(), (*indices.shape, quantizer.embedding.weight.shape[1]))
        results["decoded_cids"] = model.decode(codes, quantize=False)
    if case.args.get("std"):
        model.measure_scale(model.encode(image, noise) for image in [x])
        results |= {"scale_factor": model.scale_factor, "encoding_rescaled": model.encode(x, noise)}
    return results


@torch.no_grad()
def conditioner(case: Case, tmp_path) -> dict:
    case.allow_args("batch_key")
    model = case.model().model
    key = case.args.get("batch_key") or case.params.get("cond_stage_key", "image")
    return {"cond": only_slot(model.condition({key: case.inputs["cond"]}))}


@torch.no_grad()
def apply_model(case: Case, tmp_path) -> dict:
    """Run a whole model of published size: the condition made from token ids, labels or maps, then its network."""
    case.allow_args()
    model, inputs = case.model().model, case.inputs
    values = [inputs[name] for name in ("tokens", "label", "seg") if name in inputs]
    values = [value if value.shape[-2:-1] == value.shape[-1:] else images_first(value) for value in values]  # squares
    batch = {part.key: value for part, value in zip(model.conditioners(), values, strict=True)}
    results = {"eps": model.model(inputs["x"], inputs["t"], model.condition(batch))}
    if "z" in inputs:
        results["decoded"] = model.decode(inputs["z"])
    return results


ADAPTERS = {
    "apply_model": apply_model,
    "schedule": schedule,
    "ddpm_math": ddpm_math,
    "p_losses": p_losses,
    "forward_loss": forward_loss,
    "first_stage": first_stage,
    "conditioning": conditioner,
}
