import random
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.times import Uniform, golden_ratio_uniforms
from ldm.training.randomness import _GAMMA, Draws, _scrambled, normals, seed_everything

CPU = torch.device("cpu")


class Launches(TorchDispatchMode):
    """Counts the operations of torch, a kernel each but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def everything(draws: Draws, count: int) -> list[torch.Tensor]:
    shapes = (count, 2, 3), (count, 5)
    return [draws.normal(shapes[0]), draws.uniform((count,)), draws.uniform(shapes[1]), draws.normal(shapes[0])]


def test_draws_of_a_sample_do_not_depend_on_the_batch() -> None:
    whole = everything(Draws.of_samples(CPU, range(10, 18), 7), 8)
    ranks = [everything(Draws.of_samples(CPU, range(10 + rank, 18, 2), 7), 4) for rank in range(2)]
    halves = [everything(Draws.of_samples(CPU, range(10 + 4 * half, 14 + 4 * half), 7), 4) for half in range(2)]
    for together, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(together[0::2], first) and torch.equal(together[1::2], second)
    for together, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(together, torch.cat(parts))


def test_draws_are_a_function_of_their_key_and_never_repeat() -> None:
    first, again, other = (Draws.keyed(CPU, *key) for key in ((1, 2), (1, 2), (1, 3)))
    x = first.normal((500, 4))
    assert torch.equal(x, again.normal((500, 4)))
    seen = torch.cat([x, first.normal((500, 4)), other.normal((500, 4))])
    assert len(seen.unique(dim=0)) == len(seen)
    assert not torch.equal(first.uniform((50,)), other.uniform((50,)))


def test_draws_have_their_distributions() -> None:
    draws = Draws.of_samples(CPU, range(5, 4005), 0)
    x, u = draws.normal((4000, 16)), draws.uniform((4000, 16))
    t = Uniform()(draws.uniform((4000,)), DiscreteVP.linear(8))
    assert abs(float(x.mean())) < 4 / 64000**0.5 and abs(float(x.var()) - 1) < 4 * (2 / 64000) ** 0.5
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 64000) ** 0.5
    assert float((torch.bincount(t, minlength=8) - 500).square().sum()) / 500 < 24.3  # chi square, 7 degrees, p = 0.001
    between = torch.corrcoef(torch.stack([x[:-1].flatten(), x[1:].flatten(), u[1:].flatten()]))
    assert float((between - torch.eye(3)).abs().max()) < 4 / 64000**0.5


def test_normals_of_a_batch_are_those_of_its_samples_in_a_few_kernels() -> None:
    """What CUDA draws, here on the CPU: bits against numpy's, the distribution, and as many kernels for any batch."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (4000,))
    x = normals(seeds, 33)
    assert x.dtype == torch.float32 and x.shape == (4000, 33) and bool(x.isfinite().all())
    assert torch.equal(normals(seeds[7:9], 33), x[7:9])  # a sample's draws are its own
    bits = _scrambled(seeds.numpy().view(np.uint64)[:, None] + np.arange(17, dtype=np.uint64) * _GAMMA)
    radii = np.sqrt(-2 * np.log(((bits >> np.uint64(32)) + 0.5) / 2**32))
    angles = 2 * np.pi * (bits & np.uint64(2**32 - 1)) / 2**32
    expected = np.concatenate([radii * np.cos(angles), radii * np.sin(angles)], 1)[:, :33]
    assert np.abs(x.numpy() - expected).max() < 1e-5
    deciles = torch.bincount((torch.special.ndtr(x.double()) * 10).long().flatten(), minlength=10)
    expected_count = x.numel() / 10
    assert float((deciles - expected_count).square().sum()) / expected_count < 27.9  # chi square, 9 degrees, p = 0.001
    between = torch.corrcoef(torch.stack([x[:-1, :-1].flatten(), x[1:, :-1].flatten(), x[:-1, 1:].flatten()]))
    assert float((between - torch.eye(3)).abs().max()) < 4 / (3999 * 32) ** 0.5
    pairs = torch.stack([x[:, :16].flatten(), x[:, 17:].flatten()])  # of one hash each
    halves, squares = torch.corrcoef(pairs), torch.corrcoef(pairs.square())
    assert max(abs(float(halves[0, 1])), abs(float(squares[0, 1]))) < 4 / (4000 * 16) ** 0.5
    counts = []
    for batch in (2, 200):
        with Launches() as launches:
            normals(seeds[:batch], 64)
        counts.append(launches.count)
    assert counts[0] == counts[1] < 40


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="3 samples .* 2"):
        Draws.of_samples(CPU, range(2), 0).normal((3, 1))


@pytest.mark.parametrize("first", [0, 17, 1000])
def test_validation_times_cover_the_axis_evenly(first: int) -> None:
    u = golden_ratio_uniforms(torch.arange(first, first + 64))
    counts = torch.bincount((u * 8).long(), minlength=8)
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert counts.min() >= 6 and counts.max() <= 10
    assert torch.equal(u[32:], golden_ratio_uniforms(torch.arange(first + 32, first + 64)))


def test_all_64_bits_of_a_run_s_seed_count() -> None:
    def draws(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    found = [draws(seed) for seed in (7, 7 + 2**32, 7 + 2**63, 2**64 - 1)]
    assert all(len(set(values)) == 4 for values in zip(*found, strict=True))
    pl.seed_everything(7, verbose=False)
    assert found[0] == (random.random(), float(np.random.rand()), float(torch.rand(())))
