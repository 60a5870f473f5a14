"""What is trained of a model: all that can be, the parameters that patterns name, or an adapter alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ldm.errors import UserError
from ldm.weights.adapters import LoRA
from ldm.weights.patterns import matched


def choose_trained(model: nn.Module, train: Sequence[str] | None, adapter: LoRA | None) -> None:
    """Freeze what is not to be trained.

    train: patterns of names in the state dict; None trains everything or, with an adapter, nothing beside it. UserError
    for a pattern that matches nothing that is trained without them.
    """
    if train is None and adapter is None:
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = matched(train or (), trained, "train", "parameter that this training changes")
    if adapter is not None:
        adapter.attach(model)
    elif not chosen:
        raise UserError("train: names nothing; give a pattern, or leave it out to train everything")
    for name, parameter in trained.items():
        parameter.requires_grad_(name in chosen)


def evaluate_frozen(module: nn.Module) -> None:
    """Set parts of which nothing is trained to eval mode, so that dropout and running statistics rest."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        evaluate_frozen(child)
