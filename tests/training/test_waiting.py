"""Nothing in a step waits for the device: seen without one, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fitting import Noise, end_step
from tiny import autoencoder_training, class_diffusion, vq_training
from torch import Tensor
from without_device import on_cuda

from ldm.data.core.loader import collate
from ldm.training.module import TrainingModule


@pytest.mark.parametrize("make", [class_diffusion, autoencoder_training, vq_training])
def test_nothing_in_a_step_waits(make: Callable[[], TrainingModule], monkeypatch: pytest.MonkeyPatch) -> None:
    training = make().train()
    training.setup("fit")
    samples = collate([Noise()[index] for index in range(4)])
    with on_cuda(monkeypatch, training) as waits:
        training._device = torch.device("cuda", 0)
        optimizer = training.configure_optimizers()["optimizer"]
        batch = {
            name: value.to("cuda", non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in samples.items()
        }
        for number in range(2):
            waits.found.clear()  # what is made in the first step may wait
            with torch.no_grad():  # gradients need a device
                training.training_step(batch, number)
            for parameter in training.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            end_step(training, optimizer)
    assert not waits.found
