import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.times import Uniform, golden_ratio_uniforms
from ldm.training.randomness import Draws, seed_everything

CPU = torch.device("cpu")


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
