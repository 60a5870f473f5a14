"""What a step is foretold to cost: counted without data, it is what a real step keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from fitting import Noise
from tiny import SIZE, autoencoder_training, class_diffusion, vq_training

from ldm.data.core.loader import collate
from ldm.training.cost import StepCost, StepCounter, Way, cost_lines, largest_batch
from ldm.training.devices import autocast
from ldm.training.memory import Meter, SavedTensors
from ldm.training.module import TrainingModule

BATCH = 3
MAKERS = (class_diffusion, autoencoder_training, vq_training)
KINDS = [(make, precision) for make in MAKERS for precision in ("32", "bf16-mixed")]
SOME = [kind if number in (1, 4) else pytest.param(*kind, marks=pytest.mark.slow) for number, kind in enumerate(KINDS)]


@cache
def counter(make: Callable[[], TrainingModule], precision: str = "32") -> StepCounter:
    with torch.device("meta"):
        return StepCounter(make(), (SIZE, SIZE), precision)


@pytest.mark.parametrize(("make", "precision"), SOME)
def test_counted_activations_are_those_of_a_real_step(make: Callable[[], TrainingModule], precision: str) -> None:
    counted = counter(make, precision)(BATCH)
    training = make().train()
    training.setup("fit")
    batch = collate([Noise()[index] for index in range(BATCH)])
    kept = SavedTensors([*training.parameters(), *training.buffers()])
    with autocast(precision, "cpu"), kept:
        loss = training.training_step(batch, 0)
    assert counted.activations == kept.bytes > 0
    loss.backward()
    gradients = [parameter.grad for parameter in training.parameters() if parameter.grad is not None]
    assert counted.gradients == sum(gradient.nbytes for gradient in gradients)


def test_checkpoint_and_state_of_the_optimiser_are_counted() -> None:
    count, training = counter(class_diffusion, "bf16-mixed"), class_diffusion()
    training.setup("fit")
    optimizer = training.configure_optimizers()["optimizer"]
    for parameter in training.optimized_parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    frozen = sum(parameter.nbytes for parameter in training.model.first_stage_model.parameters())
    whole = sum(value.nbytes for value in training.state_dict().values())
    assert count.checkpoint == (whole - frozen + states, frozen)


def test_the_meter_counts_storages_while_they_live() -> None:
    with Meter(block=1) as meter:
        x = torch.zeros(100)
        y = (x + 1)[:50]  # a view keeps the whole
        del x
        z = y @ y.view(50, 1)
        del y
    assert (meter.now, meter.peak) == (z.nbytes, 800) and meter.flops == 2 * 50


@pytest.mark.parametrize("memory", [90, 100, 1000, 12_345])
def test_the_largest_batch_fits_and_the_next_does_not(memory: int) -> None:
    def count(batch: int) -> StepCost:
        return StepCost(batch, max(100, 37 + 11 * batch), *[0] * 6)  # something else is the peak of small batches

    found = largest_batch(count, count(4), memory)
    if memory < 100:
        assert found is None
    else:
        assert found.peak <= memory < count(found.batch + 1).peak


def test_what_is_not_known_is_one_line() -> None:
    with torch.device("meta"):
        training = class_diffusion()
    training.model.image_size = None
    (line,) = cost_lines(training, 1, None, "32", Way(), 80)
    assert "not counted" in line and "size" in line
