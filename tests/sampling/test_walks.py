"""What is particular to one sampler; what all share is in tests/contract."""

import math

import pytest
import torch

from ldm.diffusion.grids import TimeGrid
from ldm.diffusion.prediction import Prediction, epsilon_to_x0
from ldm.diffusion.process import Schedule
from ldm.errors import UserError
from ldm.sampling.base import last
from ldm.sampling.ddim import DDIM
from ldm.sampling.ddpm import DDPM
from ldm.sampling.dpm_solver import DPMSolver
from ldm.sampling.plms import PLMS

SCHEDULE = Schedule.linear(1000, 0.0015, 0.0195)
MEAN, STD = 0.5, 0.3


def gaussian(x_t, t):
    """Denoise exactly for data N(MEAN, STD^2)."""
    alpha, sigma = (level.double() for level in SCHEDULE.level(t))
    x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
    return Prediction(x0, (x_t - alpha * x0) / sigma)


def flow(x, start, end):
    """Follow the probability flow of the Gaussian from level abar = start to abar = end."""

    def marginal(abar):
        return math.sqrt(abar * STD**2 + 1 - abar)

    return math.sqrt(end) * MEAN + marginal(end) / marginal(start) * (x - math.sqrt(start) * MEAN)


def middle(num_steps, total):
    """Walk from step 900 to step 100, away from the ends, where every order shows."""
    steps = torch.linspace(900, 100, num_steps + 1).round().long()
    return TimeGrid(steps[:-1], steps[1:])


def _error(sampler):
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4)
    grid, abar = sampler.grid(SCHEDULE), SCHEDULE.alphas_cumprod.double()
    exact = flow(x, abar[grid.steps[0]].item(), abar[grid.previous[-1]].item())
    return (last(sampler(gaussian, x, SCHEDULE)).x - exact).abs().max().item()


@pytest.mark.parametrize(("build", "order"), [(DDIM, 1), (PLMS, 2), (DPMSolver, 2)])
def test_error_shrinks_with_its_order(build, order):
    coarse, fine = _error(build(steps=20, spacing=middle)), _error(build(steps=80, spacing=middle))
    assert fine < coarse / 4**order * 1.5


def test_higher_orders_beat_ddim_at_few_steps():
    for build in (PLMS, DPMSolver):
        assert _error(build(steps=10, spacing="compvis")) < 0.5 * _error(DDIM(steps=10, spacing="compvis"))


def test_ddim_with_eta_one_on_all_steps_is_ancestral():
    """Same drift and same variance: with the same noise the two walks coincide (posterior variance)."""
    schedule = Schedule.linear(30, 1e-3, 0.2)

    def denoise(x_t, t):
        eps = torch.tanh(x_t)
        return Prediction(epsilon_to_x0(schedule, eps, x_t, t), eps)

    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    draws = torch.randn(30, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def walk(sampler):
        tape = iter(draws)
        return last(sampler(denoise, x, schedule, noise=lambda shape: next(tape))).x

    torch.testing.assert_close(walk(DDPM()), walk(DDIM(steps=30, eta=1.0)), atol=1e-4, rtol=1e-3)


def test_ancestral_sampling_reaches_the_moments():
    schedule = Schedule.linear(100, 1e-3, 0.2)

    def denoise(x_t, t):
        alpha, sigma = schedule.level(t)
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 200, 200, generator=generator)
    for sampler in (DDPM(), DDIM(steps=100, eta=1.0)):
        out = last(sampler(denoise, x, schedule, noise=lambda shape: torch.randn(shape, generator=generator))).x
        assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert out.std().item() == pytest.approx(STD, rel=0.08)


def test_coefficients_of_the_published_grid():
    table = DDIM(steps=5, eta=1.0, spacing="compvis").coefficients(SCHEDULE)
    assert table.timesteps.tolist() == [1, 201, 401, 601, 801]
    assert table.alphas_prev[0].item() == SCHEDULE.alphas_cumprod[0].item()
    assert table.alphas.dtype == torch.float64
    assert table.sigmas[1].item() == pytest.approx(0.054692284, rel=1e-6)


def test_start_runs_the_least_noisy_steps():
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    assert [step.t for step in DDPM(start=3)(gaussian, x, SCHEDULE)] == [2, 1, 0]
    full = [step.t for step in DDIM(steps=10)(gaussian, x, SCHEDULE)]
    for build in (DDIM, PLMS, DPMSolver):
        assert [step.t for step in build(steps=10, start=4)(gaussian, x, SCHEDULE)] == full[-4:]
        with pytest.raises(UserError, match="start"):
            build(steps=10, start=11)(gaussian, x, SCHEDULE)
    with pytest.raises(UserError, match="start"):
        DDPM(start=0)(gaussian, x, SCHEDULE)


def test_plms_evaluates_once_per_step_and_once_more():
    calls = []

    def counting(x_t, t):
        calls.append(t[0].item())
        return gaussian(x_t, t)

    last(PLMS(steps=5, spacing="compvis")(counting, torch.zeros(1, 1, 2, 2), SCHEDULE))
    assert calls == [801, 601, 601, 401, 201, 1]
