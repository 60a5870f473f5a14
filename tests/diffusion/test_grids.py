"""Properties of single grids; what all share is in tests/contract."""

import pytest
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.grids import (
    Compvis,
    CompvisQuad,
    Karras,
    Leading,
    Linspace,
    LogSNR,
    Trailing,
    Uniform,
    grid_names,
    resolve_grid,
)
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.errors import UserError

PUBLISHED = DiscreteVP.linear(1000, 0.00085, 0.012)


def steps(grid, count, process=PUBLISHED):
    return grid(process, count).tolist()


@pytest.mark.parametrize("total", [1, 2, 7, 60])
def test_uniform_has_exactly_the_steps_asked_for(total):
    for count in range(1, total + 1):
        *visited, end = steps(Uniform(), count, DiscreteVP.linear(total))
        assert len(set(visited)) == count and visited == sorted(visited, reverse=True)
        assert visited[0] == total - 1 and visited[-1] >= 0 and end == -1


def test_uniform_spaces_the_axis_of_a_continuous_process():
    assert steps(Uniform(), 4, RectifiedFlow()) == [1, 0.75, 0.5, 0.25, 0]


def test_compvis_is_c_k_plus_one_and_ends_at_step_zero():
    assert steps(Compvis(), 50) == [*range(981, 0, -20), 0]


def test_compvis_keeps_the_published_surplus_of_steps():
    assert len(steps(Compvis(), 400)) == 501


@pytest.mark.parametrize("count", [3, 9, 27, 36, 37, 105, 300, 600, 1000])
def test_compvis_stays_inside_the_process(count):
    visited = steps(Compvis(), count)[:-1]
    assert max(visited) <= 999 and len(set(visited)) == len(visited)


def test_quadratic_grid():
    assert steps(CompvisQuad(), 5) == [801, 451, 201, 51, 1, 0]


def test_the_grids_of_diffusers():
    """The timesteps of diffusers' DDIMScheduler(timestep_spacing=...) for 1000 steps."""
    assert steps(Trailing(), 4) == [999, 749, 499, 249, -1]
    assert steps(Leading(offset=1), 4) == [751, 501, 251, 1, 0]
    assert steps(Leading(), 4) == [750, 500, 250, 0, 0]
    assert steps(Linspace(), 4) == [999, 666, 333, 0, -1]


def test_log_snr_and_karras_are_even_in_their_variable():
    for process in (PUBLISHED, EDM()):
        log_snr = process.level(LogSNR()(process, 20)[:-1]).log_snr.flatten()
        torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(19), rtol=1e-4, atol=1e-5)
        level = process.level(Karras()(process, 20)[:-1])
        root = ((level.sigma / level.alpha) ** (1 / 7)).flatten()
        torch.testing.assert_close(root.diff(), root.diff().mean().expand(19), rtol=1e-4, atol=1e-5)


def test_karras_is_equation_5_for_edm():
    i = torch.arange(18, dtype=torch.float64)
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(Karras()(EDM(), 18)[:-1], want)


@pytest.mark.parametrize("grid", [Compvis(), CompvisQuad(), Trailing(), Leading()])
def test_grids_of_whole_steps_refuse_a_process_without_them(grid):
    with pytest.raises(UserError, match="RectifiedFlow"):
        grid(RectifiedFlow(), 5)


def test_names_resolve():
    assert resolve_grid("compvis") == Compvis() and resolve_grid(Karras(rho=3)) == Karras(rho=3)
    assert {"uniform", "log_snr", "karras", "trailing", "compvis_quad"} <= set(grid_names())
    with pytest.raises(UserError, match="quad.*compvis_quad"):
        resolve_grid("quad")
