"""Adapters of the autoencoder's training losses."""

import torch
import torch.nn.functional as F

from ldm.autoencoder.regularizers import KL

from .case import Case
from .networks import gradient_norms


class ChannelWeightedError(torch.nn.Module):
    """Stand in for the perceptual distance: mean over C, H, W of weights 0.5 .. 1.5 times the squared error."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        weights = torch.linspace(0.5, 1.5, a.shape[1]).view(1, -1, 1, 1)
        return (weights * (a - b) ** 2).mean(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)


def adversarial(case: Case, tmp_path) -> dict:
    case.allow_args("steps", "tiny")
    module = case.model()
    if case.args.get("tiny", True):
        module.perceptual_loss = ChannelWeightedError()
    results = {}
    for train in (0, 1):
        module.train(bool(train))
        module.perceptual_loss.eval()
        for step in case.args["steps"]:
            for index, run in enumerate((_generator, _discriminator)):
                module.zero_grad(set_to_none=True)
                results[f"train{train}.opt{index}.step{step}"] = run(case, module, step)
    return results


def _reconstruction(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    last_layer = case.inputs["w"].clone().requires_grad_(True)
    return F.conv2d(case.inputs["h"], last_layer, padding=1), last_layer


def _generator(case: Case, module: torch.nn.Module, step: int) -> dict:
    rec, last_layer = _reconstruction(case)
    extra = {name: case.inputs[name] for name in ("cond", "weights") if name in case.inputs}
    if case.op == "loss_kl":
        regularization = KL()(case.inputs["moments"], torch.zeros)[1]
    else:
        regularization = case.inputs["codebook_loss"]
        if "indices" in case.inputs:
            extra["indices"] = case.inputs["indices"]
    loss, logs = module.generator(case.inputs["x"], rec, regularization, step, last_layer, **extra)
    loss.backward()
    return {**logs, "loss": loss, "grad_norms": gradient_norms(module), "grad_last": last_layer.grad}


def _discriminator(case: Case, module: torch.nn.Module, step: int) -> dict:
    rec, _ = _reconstruction(case)
    loss, logs = module.discriminator_loss(case.inputs["x"], rec, step, cond=case.inputs.get("cond"))
    loss.backward()
    return {**logs, "loss": loss, "grad_norms": gradient_norms(module)}


def lpips(case: Case, tmp_path) -> dict:
    case.allow_args()
    distance, y = case.model().perceptual_loss, case.inputs["y"]
    x = case.inputs["x"].clone().requires_grad_(True)
    value = distance(x, y)
    value.sum().backward()
    return {"value": value, "grad": x.grad, "same": distance(y, y)}


ADAPTERS = {"loss_kl": adversarial, "loss_vq": adversarial, "lpips": lpips}
