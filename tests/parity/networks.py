"""Adapters of single modules: forward passes with gradients, and initial values."""

import torch

from ldm.compat import instantiate
from ldm.conditioning.base import Conditioner, Conditioning, JointConditioner
from ldm.training.module import TrainingModule

from .case import Case


def published_parameters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters under the names of the state dict."""
    rename = module.published_name if isinstance(module, TrainingModule) else str
    return [(rename(name), p) for name, p in module.named_parameters()]


def gradient_norms(module: torch.nn.Module) -> torch.Tensor:
    """Give the norm of the gradient of each trainable parameter, sorted by name; 0 where there is none."""
    named = published_parameters(module)
    trainable = sorted((name, p) for name, p in named if p.requires_grad)
    return torch.stack([torch.zeros(()) if p.grad is None else p.grad.norm() for _, p in trainable])


def only_slot(conditioning: Conditioning) -> torch.Tensor:
    """Give the one tensor of a conditioning that fills one slot."""
    slots = (conditioning.concat, conditioning.context, conditioning.vector)
    (value,) = [slot for slot in slots if slot is not None]
    return value


def call(module: torch.nn.Module, inputs: list, kwargs: dict):
    """Call a module as the reference's counterpart was called."""
    if isinstance(module, JointConditioner):
        return _call_joint(module, inputs)
    if isinstance(module, Conditioner):
        return only_slot(module({module.key: inputs[0]}))
    return module(*inputs, **kwargs)


def _call_joint(module: JointConditioner, inputs: list) -> dict:
    """Feed one value to each part; the reference returns lists under the keys of its wrapper."""
    parts = [part for part in module.children() if isinstance(part, Conditioner)]
    conditioning = module({part.key: value for part, value in zip(parts, inputs, strict=True)})
    return {"c_concat": [conditioning.concat], "c_crossattn": [conditioning.context]}


def forward(case: Case, tmp_path) -> dict:
    args = case.args
    case.allow_args("inputs", "kwargs", "method", "batch_key", "small", "grad", "train", "state_after")
    model = case.model().train(bool(args.get("train")))
    inputs = [case.inputs[name].clone() for name in args["inputs"]]
    kwargs = {key: case.inputs.get(value, value) for key, value in (args.get("kwargs") or {}).items()}
    if args.get("grad") and inputs[0].is_floating_point():
        inputs[0].requires_grad_(True)
    with torch.no_grad():
        results = {"out": call(model, inputs, kwargs)}
    if args.get("grad"):
        out = call(model, inputs, kwargs)  # again, as recorded: in train mode it moves the running statistics twice
        (out * case.cotangent(out)).mean().backward()
        results["grad_norms"] = gradient_norms(model)
        results["grad_in"] = inputs[0].grad
    if args.get("small"):
        with torch.no_grad():
            results["out_small"] = call(model, [0.01 * inputs[0].detach(), *inputs[1:]], kwargs)
    state = model.state_dict()
    results["state"] = {name: state[name] for name in args.get("state_after", ())}
    return results


def init(case: Case, tmp_path) -> dict:
    case.allow_args()
    parameters = [p for _, p in sorted(instantiate(case.config).named_parameters())]
    constant = [bool((p == 0).all() or (p == 1).all()) for p in parameters]
    large = [p for p, flat in zip(parameters, constant, strict=True) if p.numel() >= 512 and not flat]
    return {
        "zero": torch.tensor([int((p == 0).all()) for p in parameters]),
        "one": torch.tensor([int((p == 1).all()) for p in parameters]),
        "requires_grad": torch.tensor([int(p.requires_grad) for p in parameters]),
        "log_std": torch.stack([p.detach().std().log() for p in large]),
    }


ADAPTERS = {"forward": forward, "init": init}
