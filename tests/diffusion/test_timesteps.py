"""Properties of the grids."""

import pytest

from ldm.diffusion.grids import SPACINGS, compvis, compvis_quad, resolve_spacing, uniform
from ldm.errors import UserError


@pytest.mark.parametrize("total", [1, 2, 7, 60])
def test_uniform_has_exactly_the_steps_asked_for(total):
    for num_steps in range(1, total + 1):
        grid = uniform(num_steps, total)
        steps = grid.steps.tolist()
        assert len(set(steps)) == len(grid) == num_steps
        assert steps == sorted(steps, reverse=True)
        assert steps[0] == total - 1 and steps[-1] >= 0
        assert grid.previous.tolist() == [*steps[1:], -1]


def test_compvis_is_c_k_plus_one_and_ends_at_step_zero():
    grid = compvis(50, 1000)
    assert grid.steps.tolist() == list(range(981, 0, -20))
    assert grid.previous.tolist() == [*range(961, 0, -20), 0]


def test_compvis_keeps_the_published_surplus_of_steps():
    assert len(compvis(400, 1000)) == 500


@pytest.mark.parametrize("num_steps", [3, 9, 27, 36, 37, 105, 300, 600, 1000])
def test_compvis_stays_inside_the_schedule(num_steps):
    steps = compvis(num_steps, 1000).steps
    assert steps.max() <= 999 and len(steps.unique()) == len(steps)


def test_quadratic_grid():
    assert compvis_quad(5, 1000).steps.tolist() == [801, 451, 201, 51, 1]


@pytest.mark.parametrize("spacing", SPACINGS.values())
@pytest.mark.parametrize("num_steps", [0, -1, 11])
def test_impossible_numbers_of_steps_are_refused(spacing, num_steps):
    with pytest.raises(UserError, match="use 1 to 10"):
        spacing(num_steps, 10)


def test_tail_keeps_the_least_noisy_steps():
    grid = uniform(5, 10).tail(2)
    assert grid.steps.tolist() == uniform(5, 10).steps.tolist()[-2:] and grid.previous[-1] == -1
    with pytest.raises(UserError, match="start"):
        uniform(5, 10).tail(6)


def test_names_resolve():
    assert resolve_spacing("compvis") is compvis and resolve_spacing(uniform) is uniform
    with pytest.raises(UserError, match="compvis_quad"):
        resolve_spacing("quad")
