import math

import pytest

from ldm.errors import UserError
from ldm.training.lr_schedules import WarmUpCosine, WarmUpCosineCycles, WarmUpLinear


def test_warm_up_is_a_straight_line_from_start_to_max() -> None:
    schedule = WarmUpCosine(warm_up_steps=4, lr_min=0.0, lr_max=1.0, lr_start=0.2, max_decay_steps=10)
    assert [schedule(n) for n in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_halfway_in_the_middle_and_stays_at_its_minimum() -> None:
    schedule = WarmUpCosine(warm_up_steps=0, lr_min=0.1, lr_max=0.9, lr_start=0.0, max_decay_steps=10)
    assert schedule(5) == pytest.approx(0.5)
    assert schedule(10) == schedule(1000) == pytest.approx(0.1)


def test_cycles_use_their_own_numbers_and_the_last_one_stays() -> None:
    schedule = WarmUpCosineCycles([2, 2], f_min=[0.0, 0.3], f_max=[1.0, 0.5], f_start=[0.5, 0.1], cycle_lengths=[10, 6])
    assert schedule(0) == 0.5 and schedule(2) == 1.0
    assert schedule(10) == pytest.approx(0.0)  # the end of a cycle belongs to it
    assert schedule(11) == pytest.approx(0.1 + 0.4 / 2)
    assert schedule(13) == pytest.approx(0.3 + 0.1 * (1 + math.cos(math.pi / 4)))
    assert schedule(16) == schedule(99) == pytest.approx(0.3)


def test_linear_falls_from_max_to_min_over_the_cycle() -> None:
    schedule = WarmUpLinear(0, f_min=0.2, f_max=1.0, f_start=0.0, cycle_lengths=8)
    assert [schedule(n) for n in (0, 4, 8, 20)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_plain_warm_up_of_the_published_configs() -> None:
    schedule = WarmUpLinear([10000], f_min=[1.0], f_max=[1.0], f_start=[1e-6], cycle_lengths=[10000000000000])
    assert schedule(0) == 1e-6 and schedule(10000) == schedule(10**9) == 1.0


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="one entry per cycle"):
        WarmUpLinear([1, 2], f_min=[1.0], f_max=[1.0], f_start=[0.0], cycle_lengths=[10])
