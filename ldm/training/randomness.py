"""Random draws as pure functions of a key and of the number of a sample, whatever batch, rank or process it is in.

In training samples are numbered through the whole run: sample i of a batch of rank r is number seen + i * world + r.
So a rerun repeats itself, no two samples share their draws, and another number of ranks, another batch size or
accumulation draws the same for each sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ldm.transfer import sent

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's: 2^64 times the golden ratio
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # SplitMix64's
_LOW_HALF = 0xFFFFFFFF
TRAINING = 0  # these mark the keys of draws, so that those of one kind never meet those of another
VALIDATION = 1
PREVIEW = 2
MEASURE = 3


def seed_from(*key: int) -> int:
    """Mix non-negative integers into one seed below 2**63."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch by all 64 bits of a seed."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    random.seed(seed)
    np.random.seed([low, high] if high else low)
    torch.manual_seed(seed_from(seed) if high else low)  # on the CPU torch takes 32 bits


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the global generators of the CPU and of one device; `torch.manual_seed` asks for every kind there is."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class Draws:
    """Draw for the samples of a batch, each from streams of its own: call k gives sample n a function of (key, n, k).

    Shapes begin with the batch. `normal` draws on the device; `uniform` is the same on every device.
    """

    def __init__(self, device: torch.device, numbers: Iterable[int] | None, key: tuple[int, ...]) -> None:
        self.device, self._key, self._calls = device, key, 0
        self._numbers = None if numbers is None else np.array(list(numbers), dtype=np.uint64)  # (B,)

    @classmethod
    def keyed(cls, device: torch.device, *key: int) -> Draws:
        """Draw for samples numbered from 0 in every batch, e.g. pictures that are to stay comparable."""
        return cls(device, None, key)

    @classmethod
    def of_samples(cls, device: torch.device, numbers: Iterable[int], *key: int) -> Draws:
        """Draw for the samples of these numbers, one of the batch each; key: non-negative integers."""
        return cls(device, numbers, key)

    @property
    def numbers(self) -> Tensor:
        """The numbers of the samples, int64 (B,)."""
        return torch.from_numpy(self._numbers.astype(np.int64))

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw float32 standard normals (B, ...)."""
        seeds = self._seeds(shape[0])
        if self.device.type == "cuda":
            return normals(sent(torch.from_numpy(seeds.view(np.int64)), self.device), math.prod(shape[1:])).view(shape)
        drawn = torch.empty(shape, device=self.device)
        generator = _generator(self.device)
        # On the CPU torch takes 32 bits of a seed: of N samples about N^2 / 2^33 pairs share their noise.
        for row, seed in zip(drawn.view(len(drawn), -1).unbind(), seeds.tolist(), strict=True):
            row.normal_(generator=generator.manual_seed(seed))
        return drawn

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Draw float32 uniforms (B, ...) from [0, 1), on the CPU."""
        entries = np.arange(int(np.prod(shape[1:])), dtype=np.uint64) * _GAMMA
        bits = _scrambled(self._seeds(shape[0])[:, None] + entries) >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) / np.float32(2**24)).view(shape)

    def _seeds(self, count: int) -> np.ndarray:
        """Return each sample a seed for the next call: uint64 (B,)."""
        base = np.uint64(seed_from(*self._key, self._calls))
        self._calls += 1
        numbers = np.arange(count, dtype=np.uint64) if self._numbers is None else self._numbers
        if len(numbers) != count:
            raise ValueError(f"draws for {count} samples were asked of those for {len(numbers)}")
        return _scrambled(base + numbers * _GAMMA)


def normals(seeds: Tensor, count: int) -> Tensor:
    """Draw float32 standard normals (B, count), a row from each seed, int64 (B,), by the transform of Box and Muller.

    A few kernels for a whole batch, where generators need one a sample. Devices differ in rounding alone.
    """
    entries = torch.arange((count + 1) // 2, device=seeds.device)
    bits = seeds[:, None] + entries * _signed(_GAMMA)  # int64 wraps around, as uint64 does in `_scrambled`
    for shift, factor in ((30, _FACTORS[0]), (27, _FACTORS[1]), (31, np.uint64(1))):
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    length = (-2 * (((bits >> 32 & _LOW_HALF) + 0.5) * 2**-32).log()).sqrt()
    angle = (bits & _LOW_HALF) * (2 * math.pi * 2**-32)
    return torch.cat([length * angle.cos(), length * angle.sin()], 1)[:, :count]


def _signed(value: np.uint64) -> int:
    """Return the int64 of the same bits."""
    return int(value.view(np.int64))


@lru_cache
def _generator(device: torch.device) -> torch.Generator:
    """Keep one generator a device, which is seeded anew before each use: making one costs more than a draw."""
    return torch.Generator(device)


def _scrambled(bits: np.ndarray) -> np.ndarray:
    """Scramble uint64 by the bijection of SplitMix64 (Steele, Lea and Flood 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FACTORS[0]
    bits = (bits ^ (bits >> np.uint64(27))) * _FACTORS[1]
    return bits ^ (bits >> np.uint64(31))
