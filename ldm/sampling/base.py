"""What all samplers share: the protocol, the step that they yield, and the hooks.

A sampler is a frozen dataclass; calling it with a denoiser and x_T returns a generator of steps, so that progress,
images and early stops are the caller's. Hooks are plain callables: `refine(x0)` edits the predicted data (clipping,
quantisation), `constrain(x_t, t)` edits the state before each step (inpainting), `noise(shape)` draws standard normals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.aliases import Noise
from ldm.diffusion.grids import Grid, Logistic, resolve_grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.process import Process, float64_levels
from ldm.errors import UserError
from ldm.transfer import sent

_LARGEST_ORDER = 3  # of multistep samplers
_MOST_STEPS = 100_000  # whose times are computed before the first
Refine = Callable[[Tensor], Tensor]
Constrain = Callable[[Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """The new state x and the predicted data x0, both (B, C, H, W), and the time t from which the step was made."""

    x: Tensor
    x0: Tensor
    t: float


def identity(x0: Tensor) -> Tensor:
    """Return the predicted data as it is."""
    return x0


def identity_constrain(x_t: Tensor, t: Tensor) -> Tensor:
    """Return the state as it is."""
    return x_t


class Sampler(Protocol):
    """Walk from noise x (B, C, H, W), of standard deviation `process.prior_std`, to data."""

    def times(self, process: Process) -> Tensor:
        """Return the times of the walk, float64 (S + 1,), falling. UserError if the process does not allow it."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        process: Process,
        *,
        refine: Refine = identity,
        constrain: Constrain = identity_constrain,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Yield one Step for each step. UserError at the call, before the first step, for what `times` refuses."""


class Hooks(NamedTuple):
    """The three hooks of a walk."""

    refine: Refine
    constrain: Constrain
    noise: Noise


class Interval(NamedTuple):
    """One step of a walk, from level (alpha, sigma) at time t to level (next_alpha, next_sigma) at time next_t."""

    t: float
    alpha: float
    sigma: float
    next_t: float
    next_alpha: float
    next_sigma: float

    @property
    def is_last(self) -> bool:
        """Whether the step ends at clean data."""
        return self.next_sigma == 0

    @property
    def h(self) -> float:
        """Length of the step in log(alpha / sigma), infinite to clean data and from noise alone."""
        return log_ratio(self.next_alpha, self.next_sigma) - log_ratio(self.alpha, self.sigma)

    @property
    def added_variance(self) -> float:
        """Variance that the process adds from the end of the step to its start, sigma^2 - (alpha/alpha' sigma')^2."""
        return max(self.sigma**2 - (self.alpha / self.next_alpha * self.next_sigma) ** 2, 0.0)  # but for rounding

    @property
    def posterior_std(self) -> float:
        """Standard deviation of q(x' | x, x_0), from which an ancestral step draws (DDPM, eq. 7)."""
        return self.next_sigma / self.sigma * math.sqrt(self.added_variance)

    def move(self, x0: Tensor, eps: Tensor, std: float = 0.0) -> Tensor:
        """Return alpha' x0 + sigma' eps, with room for noise of standard deviation `std` that is added to it."""
        return self.next_alpha * x0 + math.sqrt(max(self.next_sigma**2 - std**2, 0.0)) * eps


class History:
    """Predicted data of earlier steps, the newest first, and the log(alpha / sigma) at which each was predicted."""

    def __init__(self) -> None:
        self.data: list[Tensor] = []  # (B, C, H, W) each
        self.places: list[float] = []

    def add(self, step: Interval, x0: Tensor) -> None:
        """Add what was predicted at the start of a step; where the grid repeats a time, in place of the former."""
        place = log_ratio(step.alpha, step.sigma)
        kept = slice(1 if self.places[:1] == [place] else 0, _LARGEST_ORDER)
        self.data, self.places = [x0, *self.data[kept]], [place, *self.places[kept]]

    def distance(self, i: int, j: int) -> float:
        """Return how far prediction j lies behind prediction i, in log(alpha / sigma)."""
        return self.places[i] - self.places[j]

    def order(self, h: float, wanted: int) -> int:
        """Return the order, at most `wanted`, that a step of length h can have; 1 where lengths are infinite."""
        usable = sum(map(math.isfinite, self.places)) if 0 < h < math.inf else 1
        return max(1, min(wanted, usable))


class GridSampler:
    """Share what samplers on a grid of times have in common; a subclass is a dataclass and writes `_walk`.

    Fields: `steps` to take; `grid`, a grid or its name (None: `default_grid`); `start`, to run only so many of the
    least noisy steps.
    """

    steps: int
    grid: Grid | str | None
    start: int | None

    def times(self, process: Process) -> Tensor:
        """Return the times of the walk, float64 (S + 1,). UserError if grid or start do not fit the process."""
        if self.steps > _MOST_STEPS:
            raise UserError(f"sampler: {self.steps} steps; use at most {_MOST_STEPS}")
        grid = resolve_grid(self.grid or self.default_grid(process))
        return last_steps(grid(process, self.steps), self.start)

    def default_grid(self, process: Process) -> Grid | str:
        """Return the name of the grid on which this sampler walks unless `grid` says so."""
        return process.grid

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        process: Process,
        *,
        refine: Refine = identity,
        constrain: Constrain = identity_constrain,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Yield one Step for each step; `constrain` acts before each."""
        hooks = Hooks(refine, constrain, noise or gaussian_noise(x))
        return self._walk(denoise, x, process, intervals_of(self.times(process), process), hooks)

    def _walk(
        self, denoise: Denoise, x: Tensor, process: Process, intervals: list[Interval], hooks: Hooks
    ) -> Iterator[Step]:
        raise NotImplementedError


class MultistepSampler(GridSampler):
    """Share what samplers have in common that extrapolate from earlier steps; their further field is `order`.

    By default the steps are those of the logistic grid, on which they keep it.
    """

    order: int | None

    def times(self, process: Process) -> Tensor:
        """Return the times of the walk, float64 (S + 1,). UserError also for an order that it cannot have."""
        times = super().times(process)
        check_order(type(self).__module__.rpartition(".")[2], self.order, len(times) - 1)
        return times

    def default_grid(self, process: Process) -> Grid:
        """Return the logistic grid whose last step keeps the order."""
        return grid_of_order(self.order)


def log_ratio(alpha: float, sigma: float) -> float:
    """Return log(alpha / sigma): infinite for clean data, minus infinite for noise alone."""
    if sigma == 0:
        return math.inf
    return -math.inf if alpha == 0 else math.log(alpha / sigma)


def check_order(name: str, order: int | None, steps: int) -> None:
    """Raise UserError unless the order of a multistep sampler is 1 to 3 and not above its number of steps."""
    largest = min(_LARGEST_ORDER, steps)
    if order is not None and not 1 <= order <= largest:
        why = f" for {steps} steps, or take more of them" if order <= _LARGEST_ORDER else ""
        raise UserError(f"sampler {name}: order is {order}; use 1 to {largest}{why}")


def grid_of_order(order: int | None) -> Logistic:
    """Return the grid on which a multistep sampler of this order (None: 2) keeps it."""
    return Logistic(width=2.0 * (order or 2))


def last_steps(times: Tensor, count: int | None) -> Tensor:
    """Keep the times of the `count` least noisy steps (all if None). UserError unless 1 <= count <= S."""
    steps = len(times) - 1
    if count is None:
        return times
    if not 1 <= count <= steps:
        raise UserError(f"sampler: start is {count}; the grid has {steps} steps, so use 1 to {steps}")
    return times[-count - 1 :]


def intervals_of(times: Tensor, process: Process) -> list[Interval]:
    """Return the steps between successive times (S + 1,) as Python numbers in double precision."""
    points = list(zip(times.tolist(), *float64_levels(process, times), strict=True))
    return [Interval(*start, *end) for start, end in zip(points[:-1], points[1:], strict=True)]


def times_like(x: Tensor, t: float) -> Tensor:
    """Repeat a time for every sample of x: float32, or float64 if x is, (B,) on the device of x.

    It carries its value as `on_host` as well, for those who decide by it (see `ldm.diffusion.guidance.within`).
    """
    times = torch.full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    times.on_host = t
    return times


def gaussian_noise(like: Tensor, generator: torch.Generator | None = None) -> Noise:
    """Draw standard normals of the device and dtype of `like`."""

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    return noise


class SeededNoise:
    """Draw sample i of the batch from its own generator, seeded with seeds[i].

    An image then depends on its seed alone, not on the batch it is drawn in. The draws happen on the CPU, so that they
    do not depend on the device either.
    """

    def __init__(
        self, seeds: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.generators = [torch.Generator().manual_seed(_in_32_bits(int(seed))) for seed in seeds]
        self._skipped: list[tuple[int, ...]] = []

    def skip(self, shape: tuple[int, ...]) -> None:
        """Leave a draw out that nobody needs; later ones are what they would have been."""
        self._skipped.append(shape)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Draw (B, ...) with B = number of seeds. UserError for another batch size."""
        if shape[0] != len(self.generators):
            raise UserError(f"SeededNoise: {len(self.generators)} seeds for a batch of {shape[0]}; give one per sample")
        while self._skipped:
            skipped = self._skipped.pop(0)
            for generator in self.generators:
                torch.randn(skipped[1:], generator=generator, dtype=self.dtype)
        draws = [torch.randn(shape[1:], generator=generator, dtype=self.dtype) for generator in self.generators]
        return sent(torch.stack(draws), self.device)


def _in_32_bits(seed: int) -> int:
    """Mix a larger seed into the bits that torch takes on the CPU."""
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def add_noise(x: Tensor, std: float | Tensor, noise: Noise) -> Tensor:
    """Return x + std z with a draw z of its shape, also for std 0: the stream of random numbers is the same for all."""
    if isinstance(std, float) and std == 0 and isinstance(noise, SeededNoise):
        # No draw, and no copy to the device, which would be waited for.
        noise.skip(tuple(x.shape))
        return x
    return x + std * noise(tuple(x.shape))


def scaled_noise(noise: Noise, temperature: float) -> Noise:
    """Multiply the draws by `temperature`."""
    return lambda shape: temperature * noise(shape)


def keep_known(x0: Tensor, mask: Tensor, process: Process, noise: Noise) -> Constrain:
    """Replace the entries where mask is 1 by the noised known data: x_t <- mask q(x_t | x0) + (1 - mask) x_t.

    x0 (B, C, H, W), mask (B, 1, H, W) in [0, 1].
    """

    def constrain(x_t: Tensor, t: Tensor) -> Tensor:
        known = process.level(t).diffuse(x0, noise(tuple(x0.shape)))
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
