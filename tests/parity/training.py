"""Adapters of training: optimiser steps, averages, learning rates, checkpoints, patch-wise processing."""

import torch

from ldm.compat import instantiate
from ldm.training.ema import ExponentialMovingAverage

from .case import Case, named_normal
from .latent import conditioning
from .networks import published_parameters


def norms(named) -> torch.Tensor:
    return torch.stack([value.detach().float().norm() for _, value in sorted(named)])


@torch.no_grad()
def drift(case: Case, module: torch.nn.Module, step: int) -> None:
    """Move every parameter by the recorded amount."""
    for name, parameter in module.named_parameters():
        move = named_normal(f"{case.name}/{name}/{step}", parameter.shape)
        parameter += 0.1 * torch.from_numpy(move).float()


def ema(case: Case, tmp_path) -> dict:
    case.allow_args("decay", "use_num_upates")
    model = case.model()
    average = ExponentialMovingAverage(
        model, case.args.get("decay", 0.9999), warmup=case.args.get("use_num_upates", True)
    )
    for step in range(3):
        drift(case, model, step)
        average.update(model)
    with average.applied_to(model):
        copied = norms(model.named_parameters())
    return {"ema": average.state_dict(), "copied": copied, "restored": norms(model.named_parameters())}


@torch.no_grad()
def ema_scope(case: Case, tmp_path) -> dict:
    case.allow_args()
    training, x, t = case.model(), case.inputs["x"], case.inputs["t"]
    network = training.model.model
    results = {"plain": network(x, t, None)}
    with training.ema_scope():
        results["ema"] = network(x, t, None)
    results["restored"] = network(x, t, None)
    training.model_ema.update(network)
    with training.ema_scope():
        results["ema_updated"] = network(x, t, None)
    return results


def train_steps(case: Case, tmp_path) -> dict:
    case.allow_args("lr", "cond", "ema", "batch_key")
    model = case.model().train()
    model.learning_rate = case.args["lr"]
    built = model.configure_optimizers()
    optimizer, scheduler = built["optimizer"], built.get("lr_scheduler", {}).get("scheduler")
    x, t, noise = case.inputs["x"], case.inputs["t"], case.inputs["noise"]
    losses, rates = [], []
    for _ in range(3):
        loss = model.model.loss(x, _condition(case, model.model), t, noise, model.objective).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if model.model_ema is not None:
            model.model_ema.update(model.averaged)
        losses.append(loss.detach())
        rates.append(optimizer.param_groups[0]["lr"])
    trained = [(name, p) for name, p in published_parameters(model) if p.requires_grad]
    results = {
        "losses": torch.stack(losses),
        "lrs": torch.tensor(rates, dtype=torch.float64),
        "param_norms": norms(trained),
        "optimised": torch.tensor(sum(p.numel() for group in optimizer.param_groups for p in group["params"])),
    }
    return results | ({"ema_norms": norms(model.model_ema.named_buffers())} if case.args.get("ema") else {})


def _condition(case: Case, model):
    """Give the conditioning of a step: a trained conditioner embeds the value anew, else the value is the embedding."""
    spec = case.args.get("cond")
    if spec is None or not case.params.get("cond_stage_trainable", False):
        return conditioning(case, spec)
    return model.condition({case.args.get("batch_key") or model.cond_stage_model.key: case.inputs[spec]})


def lr(case: Case, tmp_path) -> dict:
    case.allow_args("steps")
    multiplier = instantiate(case.config)
    values = torch.tensor([multiplier(step) for step in case.args["steps"]], dtype=torch.float64)
    return {"call": values, "schedule": values}


def checkpoint(case: Case, tmp_path) -> dict:
    """Save the filled model, build it anew from that file, and see what arrived."""
    case.allow_args("extra")
    saved = {name: value.clone() for name, value in case.model().state_dict().items()}
    path = tmp_path / "saved.ckpt"
    torch.save({"state_dict": saved}, path)
    extra = {**(case.args.get("extra") or {}), "ckpt_path": str(path)}
    state = instantiate({**case.config, "params": {**case.params, **extra}}).state_dict()
    names = sorted(name for name, value in state.items() if value.is_floating_point() and value.ndim >= 2)
    return {"loaded": torch.tensor([int(torch.equal(state[name], saved[name])) for name in names])}


ADAPTERS = {
    "ema": ema,
    "ema_scope": ema_scope,
    "train_steps": train_steps,
    "lr": lr,
    "checkpoint": checkpoint,
}
