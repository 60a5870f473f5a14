"""What all samplers share: the protocol, the step that they yield, and the hooks.

A sampler is a frozen dataclass; calling it with a denoiser and x_T returns a generator of steps, so that progress,
pictures and early stops are the caller's. Hooks are plain callables: `refine(x0)` edits the predicted data (clipping,
re-quantising), `constrain(x_t, t)` edits the state (inpainting), `noise(shape)` draws standard normals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion.grids import Spacing, TimeGrid, resolve_spacing
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Schedule
from ldm.errors import UserError

Refine = Callable[[Tensor], Tensor]
Constrain = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[tuple[int, ...]], Tensor]


class Step(NamedTuple):
    """Hold the new state x and the predicted data x0, both (B, C, H, W), and the step t that was left."""

    x: Tensor
    x0: Tensor
    t: int


def identity(x0: Tensor) -> Tensor:
    """Leave the predicted data as it is."""
    return x0


def identity_constrain(x_t: Tensor, t: Tensor) -> Tensor:
    """Leave the state as it is."""
    return x_t


class Sampler(Protocol):
    """Walk from noise x (B, C, H, W) to data.

    Raises UserError at the call, before the first step, when the grid does not fit the schedule.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        *,
        refine: Refine = identity,
        constrain: Constrain = identity_constrain,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Yield one Step per step of the grid."""


class Hooks(NamedTuple):
    """Hold the three hooks of a walk."""

    refine: Refine
    constrain: Constrain
    noise: Noise


class GridSampler:
    """Share what samplers on a sub-grid of steps have in common; a subclass is a dataclass and writes `_walk`.

    Fields: `steps` to take; `spacing`, a function (S, T) -> TimeGrid or its name in SPACINGS; `start`, to run only so
    many of the least noisy steps.
    """

    steps: int
    spacing: Spacing | str
    start: int | None

    def grid(self, schedule: Schedule) -> TimeGrid:
        """List the steps of the walk. UserError unless 1 <= steps <= T and start fits."""
        return resolve_spacing(self.spacing)(self.steps, schedule.num_steps).tail(self.start)

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        *,
        refine: Refine = identity,
        constrain: Constrain = identity_constrain,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Yield one Step per step; `constrain` acts before each step."""
        hooks = Hooks(refine, constrain, noise or gaussian_noise(x))
        return self._walk(denoise, x, schedule, self.grid(schedule), hooks)

    def _walk(self, denoise: Denoise, x: Tensor, schedule: Schedule, grid: TimeGrid, hooks: Hooks) -> Iterator[Step]:
        raise NotImplementedError


def steps_like(x: Tensor, step: int) -> Tensor:
    """Repeat a step number for every sample of x. Returns int64 (B,) on the device of x."""
    return torch.full((x.shape[0],), step, dtype=torch.long, device=x.device)


def gaussian_noise(like: Tensor, generator: torch.Generator | None = None) -> Noise:
    """Draw standard normals of the device and dtype of `like`."""

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    return noise


class SeededNoise:
    """Draw sample i of the batch from its own generator, seeded with seeds[i].

    A picture then depends on its seed alone, not on the batch it is drawn in. The draws happen on the CPU, so that they
    do not depend on the device either.
    """

    def __init__(
        self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Draw (B, ...) with B = number of seeds. UserError for another batch size."""
        if shape[0] != len(self.generators):
            raise UserError(f"SeededNoise: {len(self.generators)} seeds for a batch of {shape[0]}; give one per sample")
        draws = [torch.randn(shape[1:], generator=generator, dtype=self.dtype) for generator in self.generators]
        return torch.stack(draws).to(self.device)


def scaled_noise(noise: Noise, temperature: float) -> Noise:
    """Multiply the draws by `temperature`."""
    return lambda shape: temperature * noise(shape)


def keep_known(x0: Tensor, mask: Tensor, schedule: Schedule, noise: Noise) -> Constrain:
    """Hold the pixels where mask is 1 at the noised known data: x_t <- mask q(x_t | x0) + (1 - mask) x_t.

    x0 (B, C, H, W), mask (B, 1, H, W) in [0, 1].
    """

    def constrain(x_t: Tensor, t: Tensor) -> Tensor:
        known = schedule.diffuse(x0, t, noise(tuple(x0.shape)))
        return mask * known + (1 - mask) * x_t

    return constrain


def last(steps: Iterator[Step]) -> Step:
    """Run a sampler to its end and return the last step."""
    step = None
    for step in steps:  # noqa: B007 - only the last one is wanted
        pass
    if step is None:
        raise UserError("sampler: no step was taken")
    return step
