"""Hooks and noise sources."""

import pytest
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.errors import UserError
from ldm.sampling.base import SeededNoise, Step, gaussian_noise, keep_known, last, scaled_noise


def test_seeded_noise_does_not_depend_on_the_batch():
    both, second = SeededNoise([3, 4]), SeededNoise([4])
    for _ in range(3):
        torch.testing.assert_close(both((2, 1, 4, 4))[1:], second((1, 1, 4, 4)), rtol=0, atol=0)


def test_all_64_bits_of_a_seed_count():
    seeds = [7, 7 + 2**32, 7 + 2**40, 7 + 2**63, 2**64 - 1]
    draws = SeededNoise(seeds)((5, 3))
    assert len({tuple(row) for row in draws.tolist()}) == 5
    torch.testing.assert_close(draws[0], torch.randn(3, generator=torch.Generator().manual_seed(7)), rtol=0, atol=0)


def test_seeded_noise_refuses_another_batch_size():
    with pytest.raises(UserError, match="2 seeds for a batch of 3"):
        SeededNoise([1, 2])((3, 1))


def test_gaussian_noise_follows_dtype_and_generator():
    like = torch.zeros(1, dtype=torch.float64)
    draws = [gaussian_noise(like, torch.Generator().manual_seed(0))((2, 3)) for _ in range(2)]
    assert draws[0].dtype == torch.float64
    torch.testing.assert_close(*draws)
    torch.testing.assert_close(scaled_noise(lambda shape: torch.ones(shape), 0.5)((2,)), torch.full((2,), 0.5))


def test_keep_known_replaces_only_the_mask():
    process = DiscreteVP.linear(10)
    x0, x_t = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 7.0)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    out = keep_known(x0, mask, process, torch.zeros)(x_t, torch.tensor([4]))
    alpha = process.level(torch.tensor([4])).alpha
    torch.testing.assert_close(out, torch.where(mask.bool(), alpha, x_t))


def test_last_returns_the_final_step():
    x = torch.zeros(1)
    assert last(iter([Step(x, x, 1), Step(x, x, 0)])).t == 0
    with pytest.raises(UserError, match="no step"):
        last(iter([]))
