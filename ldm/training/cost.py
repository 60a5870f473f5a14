"""What a training step costs, counted before anything is allocated: memory, FLOPs, the size of a checkpoint.

A real step (forward, backward, average; a fused optimiser needs no more than its state) runs on tensors without data;
each storage is counted while it lives, in the blocks of CUDA's allocator. Not counted are the driver's context, the
workspaces of libraries, and fragments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from ldm.errors import UserError
from ldm.networks.fused_norm import counted_as_on_cuda
from ldm.networks.perceptual import LPIPS
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.devices import autocast
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.lightning_fixes.checkpoints import frozen_names
from ldm.training.made_up_steps import Size, forward
from ldm.training.memory import Meter, SavedTensors
from ldm.training.module import TrainingModule
from ldm.training.shares import Sharing

_GIB = 2**30
_RESERVE = 1.0  # GiB of a card that are left to the driver and to fragments
_TRIES = 12


@dataclass(frozen=True)
class StepCost:
    """Bytes on a device at the peak of a step, and of these what lasts; FLOPs of forward and backward pass.

    Args:
        activations: what the forward pass keeps for the backward pass, beside the weights.
    """

    batch: int
    peak: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    flops: int

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "averages", "activations")
        parts = ", ".join(f"{name} {getattr(self, name) / _GIB:.2f}" for name in names)
        return f"{self.peak / _GIB:.2f} GiB at the peak of a step of {self.batch} ({parts})"


@dataclass(frozen=True)
class Way:
    """How networks compute: by the kernels for CUDA or by torch's alone, and whether images lie channels last."""

    kernels: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class TrainingCost:
    """What a training costs: a step, a checkpoint and, stored once, its frozen parts in bytes; what a card takes.

    Args:
        card: memory of the card in GiB.
        largest: the cost of the largest batch that fits on it, None if none does.
        sharing: how several devices share it; costs are of the one that holds most.
    """

    step: StepCost
    checkpoint: int
    frozen: int
    card: float
    largest: StepCost | None
    sharing: Sharing = Sharing()

    def lines(self) -> list[str]:
        """Describe it."""
        frozen = f", and {self.frozen / _GIB:.2f} GiB of frozen parts once" if self.frozen else ""
        largest = self.largest
        fitting = "not even 1" if largest is None else f"{largest.batch} ({largest.peak / _GIB:.2f} GiB)"
        return [
            f"memory per device{self.sharing}: {self.step}",
            f"work of a step: {self.step.flops / 1e12:.4g} TFLOP per device",
            f"checkpoint: {self.checkpoint / _GIB:.2f} GiB{frozen}",
            f"largest batch on a card of {self.card:g} GiB, {_RESERVE:g} of them for the driver: {fitting}",
        ]


def training_cost(
    training: TrainingModule,
    batch: int,
    size: Size | None,
    precision: str,
    way: Way,
    card: float,
    sharing: Sharing = Sharing(),  # noqa: B008 (immutable)
) -> TrainingCost:
    """Return what steps of a batch and checkpoints cost, and the largest batch on a card of so many GiB.

    `training` is on the meta device, and is used up. UserError for trainings that cannot be counted.
    """
    count = StepCounter(training, _size(training, size), precision, way, sharing)
    step = count(batch)
    largest = largest_batch(count, step, (card - _RESERVE) * _GIB)
    return TrainingCost(step, *count.checkpoint, card, largest, sharing)


def cost_lines(training: TrainingModule, *settings: Any) -> list[str]:
    """Return lines on `training_cost`, which has the same arguments; one line where that is unknown."""
    try:
        return training_cost(training, *settings).lines()
    except UserError as error:
        return [f"memory: not counted ({error})"]


def largest_batch(count: Callable[[int], StepCost], known: StepCost, memory: float) -> StepCost | None:
    """Return the cost of the largest batch that fits into so many bytes, None if none does: by secants, and checked."""
    costs = {known.batch: known}
    low, high = 0, math.inf  # what fits, and what does not
    batch = known.batch
    for _ in range(_TRIES):
        if batch not in costs:
            costs[batch] = count(batch)
        low, high = (max(low, batch), high) if costs[batch].peak <= memory else (low, min(high, batch))
        if high - low == 1:
            break
        # An affine guess by the two that are nearest; where the peak does not depend on the batch, twice or the middle.
        near = sorted(costs.values(), key=lambda cost: abs(cost.peak - memory))[:2]
        step, rise = near[-1].batch - near[0].batch, near[-1].peak - near[0].peak
        if rise:
            batch = near[0].batch + math.floor((memory - near[0].peak) * step / rise)
        elif high == math.inf:
            batch = 2 * low
        else:
            batch = (low + high) // 2
        batch = int(min(max(batch, low + 1), high - 1))
    return costs.get(low)


class StepCounter:
    """Count steps of a training (on the meta device) on images of a size; the batch is the argument of a call.

    Of several devices that share the training, that with most is counted.
    """

    def __init__(
        self,
        training: TrainingModule,
        size: Size,
        precision: str,
        way: Way = Way(),  # noqa: B008 (immutable)
        sharing: Sharing = Sharing(),  # noqa: B008 (immutable)
    ) -> None:
        self.training, self.size, self.precision, self.way, self.sharing = training, size, precision, way, sharing
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        for part in training.modules():
            if isinstance(part, LPIPS):
                part._is_ready = True  # there is nothing to read weights into
            if way.channels_last and isinstance(part, nn.Conv2d):
                part.register_forward_pre_hook(_to_channels_last)
        if way.channels_last:
            training.to(memory_format=torch.channels_last)
        with self._mode:
            for part in training.modules():  # each once, also a first stage that is a conditioner too
                part.to_empty(device="cpu", recurse=False)
        training.train()
        training.setup("fit")
        self._optimizer = self._made_optimizer()

    def __call__(self, batch: int) -> StepCost:
        """Return the cost of a step."""
        training, live = self.training, Meter()
        with self._mode, live:
            live.hold([*training.parameters(), *training.buffers()])
            live.hold(tree_leaves([dict(state) for state in self._optimizer.state.values()]))
            if self.sharing.keeps_gradients:
                for parameter in training.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            kept = SavedTensors([*training.parameters(), *training.buffers()])
            with autocast(self.precision, "cpu"), counted_as_on_cuda(self.way.kernels):
                with kept:
                    loss = forward(training, batch, self.size)
                loss.backward()
            del loss
            flops = live.flops
            gradients = [parameter.grad for parameter in training.parameters() if parameter.grad is not None]
            for average in training.all_averages():
                average.update(training.averaged)
            training.zero_grad(set_to_none=True)
        whole, held = (one.held(training, self._optimizer, gradients) for one in (Sharing(), self.sharing))
        peak = live.peak - sum(whole) + sum(held) + self.sharing.gathered(training)
        return StepCost(batch, peak, *held, kept.bytes, flops)

    @property
    def checkpoint(self) -> tuple[int, int]:
        """Return the bytes of a checkpoint and those of the frozen parts, which are stored once."""
        state, frozen = self.training.state_dict(), set(frozen_names(self.training))
        states = tree_leaves([dict(state) for state in self._optimizer.state.values()])
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
        own = sum(size for name, size in sizes.items() if name not in frozen)
        return own + _bytes(states), _bytes(state[name] for name in frozen if name in state)

    def _made_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimiser with its state, as it is after the first step."""
        with self._mode:
            optimizer = self.training.configure_optimizers()["optimizer"]
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return optimizer


def _size(training: TrainingModule, size: Size | None) -> Size:
    """Return the size of the images, that of the config or that for which the model was made."""
    if size is None and isinstance(training, DiffusionTraining):
        size = training.model.image_size
    if size is None and isinstance(training, AutoencoderTraining):
        size = (training.model.architecture.resolution,) * 2
    if size is None:
        raise UserError("the config does not say the size of the images")
    return size


def _to_channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return inputs of a convolution in the layout of its output, which CUDA takes from the weights."""
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
