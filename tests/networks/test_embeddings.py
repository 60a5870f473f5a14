"""Closed form of the embedding of time."""

import math

import pytest
import torch

from ldm.networks.embeddings import timestep_embedding


def test_cosines_come_before_sines_and_frequencies_are_divided_by_half():
    t, dim = torch.tensor([0, 1, 999]), 8
    frequencies = [10000 ** (-k / 4) for k in range(4)]  # 1, 0.1, 0.01, 0.001: the last one is not 1 / 10000
    rows = [[math.cos(s * f) for f in frequencies] + [math.sin(s * f) for f in frequencies] for s in t.tolist()]
    torch.testing.assert_close(timestep_embedding(t, dim), torch.tensor(rows), atol=1e-4, rtol=0)


def test_odd_width_ends_in_a_zero():
    embedding = timestep_embedding(torch.tensor([3, 7]), 9)
    assert embedding.shape == (2, 9)
    assert not embedding[:, -1].any()
    torch.testing.assert_close(embedding[:, :-1], timestep_embedding(torch.tensor([3, 7]), 8))


@pytest.mark.parametrize("max_period", [100, 10000])
def test_distance_depends_only_on_the_difference_of_times(max_period):
    a, b, c, d = timestep_embedding(torch.tensor([1.5, 4.0, 11.5, 14.0]), 32, max_period)
    torch.testing.assert_close(a @ b, c @ d)
    torch.testing.assert_close(a @ a, torch.tensor(16.0))


def test_repeat_only_copies_the_times():
    assert timestep_embedding(torch.tensor([3, 7]), 2, repeat_only=True).tolist() == [[3, 3], [7, 7]]
