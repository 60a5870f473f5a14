"""Random draws as pure functions of a key, usually (seed, rank, step, batch): ranks differ and a rerun repeats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GOLDEN_RATIO = 0.6180339887498949
VALIDATION = 1  # marks the keys of validation draws, so that they never meet those of training
PREVIEW = 2
MEASURE = 3


def seed_from(*key: int) -> int:
    """Mix non-negative integers into one seed below 2**63."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Draws:
    """Draw on a device, from `generator`; `host` is an independent generator for those who draw on the CPU."""

    generator: torch.Generator
    host: torch.Generator

    @classmethod
    def keyed(cls, device: torch.device, *key: int) -> Draws:
        """Start a new stream of draws for a key of non-negative integers."""
        on_device, on_host = seed_from(*key, 0), seed_from(*key, 1)
        return cls(torch.Generator(device).manual_seed(on_device), torch.Generator().manual_seed(on_host))

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw float32 standard normals."""
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def timesteps(self, count: int, num_steps: int) -> Tensor:
        """Draw `count` steps uniformly from 0 .. num_steps - 1."""
        return torch.randint(num_steps, (count,), generator=self.generator, device=self.generator.device)


def spread_timesteps(first: int, count: int, num_steps: int) -> Tensor:
    """Return the steps of samples first .. first + count - 1 in a fixed order that covers 0 .. num_steps - 1 evenly.

    Multiples of the golden ratio modulo 1: any run of consecutive samples is close to evenly spaced. On the CPU.
    """
    position = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * _GOLDEN_RATIO % 1.0
    return (position * num_steps).long().clamp(max=num_steps - 1)
