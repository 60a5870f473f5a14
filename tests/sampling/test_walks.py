"""What is particular to one sampler; what all share is in tests/contract."""

import math
from dataclasses import replace

import pytest
import torch

from ldm.diffusion.cosine import Cosine
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.grids import resolve_grid
from ldm.diffusion.prediction import Denoised, x0_from_eps
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.errors import UserError
from ldm.sampling import make_sampler
from ldm.sampling.base import SeededNoise, intervals_of, last
from ldm.sampling.ddim import DDIM
from ldm.sampling.ddpm import DDPM
from ldm.sampling.dpm_solver import DPMSolver
from ldm.sampling.dpm_solver_sde import SDEDPMSolver
from ldm.sampling.euler import Euler
from ldm.sampling.heun import Heun
from ldm.sampling.plms import PLMS
from ldm.sampling.unipc import UniPC

PUBLISHED = DiscreteVP.linear(1000, 0.00085, 0.012)
MEAN, STD = 0.5, 0.5


def gaussian(process):
    """Return the exact denoiser for data N(MEAN, STD^2)."""

    def denoise(x_t, t):
        level = process.level(t)
        alpha, sigma = level.alpha.double(), level.sigma.double()
        variance = (alpha * STD) ** 2 + sigma**2
        centred = x_t - alpha * MEAN
        return Denoised(MEAN + alpha * STD**2 / variance * centred, sigma / variance * centred)

    return denoise


def error(sampler, process):
    """Return the distance to the exact probability flow from the first time of the walk to its last."""
    times = sampler.times(process)
    (start, *_), end = intervals_of(times, process), process.level(times[-1:])
    x = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, 1, 4, 4) * math.hypot(start.alpha * STD, start.sigma)
    spread = math.hypot(end.alpha.item() * STD, end.sigma.item()) / math.hypot(start.alpha * STD, start.sigma)
    exact = end.alpha.item() * MEAN + spread * (x - start.alpha * MEAN)
    return (last(sampler(gaussian(process), x, process)).x - exact).abs().max().item()


def default_grid(sampler, process):
    """Return the grid of a sampler, ending at the least noisy level instead of clean data."""
    return type(resolve_grid(sampler.default_grid(process)))(end="cleanest")


@pytest.mark.parametrize("process", [PUBLISHED, Cosine(), RectifiedFlow(), EDM()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(("cls", "order"), [(DDIM, 1), (Euler, 1), (PLMS, 2), (DPMSolver, 2), (Heun, 2)])
def test_error_falls_with_the_order_on_the_default_grid(cls, order, process):
    grid = default_grid(cls(), process)
    coarse, fine = (error(cls(steps=steps, grid=grid), process) for steps in (40, 160))
    assert fine < coarse / 4**order * 1.35
    assert math.log(coarse / fine) / math.log(4) < order + 1.2


@pytest.mark.parametrize("process", [PUBLISHED, Cosine(), RectifiedFlow(), EDM()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    ("sampler", "order", "steps"),
    [
        *[(DPMSolver(order=order, exact=True), order, 20) for order in (1, 2, 3)],
        *[(UniPC(order=order), order + 1, 40) for order in (1, 2)],  # the corrector's
        (UniPC(order=3), 3, 40),
    ],
)
def test_error_of_multistep_samplers_falls_with_their_order(sampler, order, steps, process):
    grid = default_grid(sampler, process)
    coarse, fine = (error(replace(sampler, steps=count, grid=grid), process) for count in (steps, 4 * steps))
    assert fine < coarse / 4**order * 1.35


def test_the_published_third_order_is_better_than_the_second():
    for process in (PUBLISHED, Cosine(), EDM()):
        grid = default_grid(DPMSolver(), process)
        second, third = (error(DPMSolver(steps=40, order=order, grid=grid), process) for order in (2, 3))
        assert third < second / 2


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("process", [PUBLISHED, Cosine(), RectifiedFlow(), EDM()], ids=lambda one: type(one).__name__)
def test_the_stochastic_solver_draws_what_the_process_has(process, order):
    """Mean and spread of the samples, exactly: x stays Gaussian, and the walk is linear in x and the draws."""
    sampler, unit = SDEDPMSolver(steps=30, order=order), iter(torch.eye(32, dtype=torch.float64)[1:])
    level = process.level(sampler.times(process)[:1])
    spread = math.hypot(level.alpha.item() * STD, level.sigma.item())
    # sample 0 has no noise, sample 1 that of x_T, and each further one that of one step
    x = level.alpha * MEAN + spread * next(unit).view(-1, 1, 1, 1)
    out = last(sampler(gaussian(process), x, process, noise=lambda shape: next(unit).view(shape))).x.flatten()
    assert out[0].item() == pytest.approx(MEAN, abs=0.02)
    assert (out[1:] - out[0]).norm().item() == pytest.approx(STD, rel=0.25 if order == 1 else 0.05)


@pytest.mark.parametrize("cls", [DPMSolver, SDEDPMSolver, UniPC])
def test_an_order_needs_as_many_steps(cls):
    with pytest.raises(UserError, match="order is 3; use 1 to 2 for 2 steps"):
        cls(steps=2, order=3)(gaussian(PUBLISHED), torch.zeros(1, 1, 2, 2), PUBLISHED)
    with pytest.raises(UserError, match="order is 3; use 1 to 2 for 2 steps"):
        cls(steps=20, order=3, start=2).times(PUBLISHED)
    for order in (0, 4):
        with pytest.raises(UserError, match=f"order is {order}; use 1 to 3"):
            cls(order=order).times(PUBLISHED)


def test_absurdly_many_steps_are_refused_before_their_times_fill_the_memory():
    with pytest.raises(UserError, match="10000000000 steps; use at most 100000"):
        DPMSolver(steps=10**10).times(PUBLISHED)


@pytest.mark.parametrize("options", [{"s_churn": -1.0}, {"s_noise": math.nan}, {"s_tmin": 3.0, "s_tmax": 2.0}])
def test_impossible_churn_is_refused(options):
    with pytest.raises(UserError, match=f"heun.*{next(iter(options))}"):
        Heun(**options)


def test_churn_keeps_the_spread():
    process = PUBLISHED
    x = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = SeededNoise([3], dtype=torch.float64)
    out = last(Heun(steps=40, s_churn=20.0)(gaussian(process), x, process, noise=draw)).x
    assert out.std().item() == pytest.approx(STD, rel=0.05)


def test_options_of_a_sampler_may_follow_its_name():
    assert make_sampler("dpm_solver:order=3", steps=9) == DPMSolver(9, order=3)
    assert make_sampler("heun:s_churn=40,s_noise=1.003") == Heun(s_churn=40, s_noise=1.003)
    with pytest.raises(UserError, match="heun.*s_chrn.*s_churn"):
        make_sampler("heun:s_chrn=40")
    for spec, named in (("heun:s_churn=much", "s_churn=much is no number"), ("unipc:order=2.5", "order=2.5.*whole")):
        with pytest.raises(UserError, match=named):
            make_sampler(spec)
    with pytest.raises(UserError, match="heun: s_churn is given twice, as 4 and 5"):
        make_sampler("heun:s_churn=4,s_churn=5")
    assert make_sampler("heun:grid=karras,s_tmax=inf").grid == "karras"


def test_multistep_samplers_beat_ddim_on_their_default_grids():
    for cls in (PLMS, DPMSolver, Heun, UniPC):
        for steps in (10, 20, 40):
            assert error(cls(steps=steps), PUBLISHED) < 0.3 * error(DDIM(steps=steps), PUBLISHED)


@pytest.mark.parametrize("process", [RectifiedFlow(), EDM(), PUBLISHED], ids=lambda one: type(one).__name__)
def test_euler_is_ddim_without_noise(process):
    x = process.prior_std * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    walks = [list(sampler(gaussian(process), x, process)) for sampler in (Euler(steps=8), DDIM(steps=8))]
    for one, other in zip(*walks, strict=True):
        torch.testing.assert_close(one.x, other.x)


def test_euler_on_a_flow_follows_its_velocity():
    process, x = RectifiedFlow(), torch.tensor([[[[1.3]]]], dtype=torch.float64)
    times = Euler(steps=4).times(process)
    want = x
    for t, s in zip(times[:-1], times[1:], strict=True):
        x0, eps = gaussian(process)(want, t.expand(1))
        want = want + (s - t) * (eps - x0)
    torch.testing.assert_close(last(Euler(steps=4)(gaussian(process), x, process)).x, want)


def test_plms_keeps_its_promise_where_hardly_any_signal_is_left():
    """Adams-Bashforth on eps divides by alpha; on a cosine process it drew nothing right at 10 steps."""
    cosine = DiscreteVP.cosine(1000)
    assert error(PLMS(steps=10), cosine) < error(DDIM(steps=10), cosine)
    assert error(PLMS(steps=10, grid="uniform"), cosine) < error(DDIM(steps=10), cosine)


def test_ddim_with_eta_one_on_all_steps_is_ancestral():
    """Same drift and same variance: with the same noise the two walks coincide (posterior variance)."""
    process = DiscreteVP.linear(30, 1e-3, 0.2)

    def denoise(x_t, t):
        eps = torch.tanh(x_t)
        return Denoised(x0_from_eps(eps, x_t, process.level(t)), eps)

    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    draws = torch.randn(30, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def walk(sampler):
        tape = iter(draws)
        return last(sampler(denoise, x, process, noise=lambda shape: next(tape))).x

    torch.testing.assert_close(walk(DDPM()), walk(DDIM(steps=30, eta=1.0)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("process", [DiscreteVP.linear(100, 1e-3, 0.2), RectifiedFlow(), EDM(noisiest=20.0)])
def test_ancestral_sampling_reaches_the_moments(process):
    generator = torch.Generator().manual_seed(0)
    x = process.prior_std * torch.randn(1, 1, 200, 200, generator=generator, dtype=torch.float64)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    for sampler in (DDPM(steps=100), DDIM(steps=100, eta=1.0)):
        out = last(sampler(gaussian(process), x, process, noise=draw)).x
        assert out.mean().item() == pytest.approx(MEAN, abs=0.015)
        assert out.std().item() == pytest.approx(STD, rel=0.05)


def test_posterior_weight_adds_noise_to_ancestral_steps():
    exact, upper = (DiscreteVP.linear(10, 1e-2, 0.3, posterior_weight=weight) for weight in (0.0, 1.0))
    x, spreads = torch.zeros(1, 1, 100, 100), []
    for process in (exact, upper):
        draw = torch.Generator().manual_seed(0)
        walk = DDPM()(gaussian(process), x, process, noise=lambda shape, g=draw: torch.randn(shape, generator=g))
        spreads.append(next(iter(walk)).x.std().item())
    assert spreads[1] > spreads[0]


def test_ancestral_sampling_needs_a_number_of_steps_of_a_continuous_process():
    with pytest.raises(UserError, match="DDPM.*RectifiedFlow"):
        DDPM()(gaussian(RectifiedFlow()), torch.zeros(1, 1, 2, 2), RectifiedFlow())


def test_coefficients_of_the_published_grid():
    walk = intervals_of(DDIM(steps=5, grid="compvis").times(DiscreteVP.linear(1000, 0.0015, 0.0195)), PUBLISHED)
    assert [step.t for step in walk] == [801, 601, 401, 201, 1] and walk[-1].next_t == 0
    process = DiscreteVP.linear(1000, 0.0015, 0.0195)
    walk = intervals_of(DDIM(steps=5, grid="compvis").times(process), process)
    assert walk[-2].posterior_std == pytest.approx(0.054692284, rel=1e-6)


def test_start_runs_the_least_noisy_steps():
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    assert [step.t for step in DDPM(start=3)(gaussian(PUBLISHED), x, PUBLISHED)] == [2, 1, 0]
    for cls in (DDIM, PLMS, DPMSolver, Heun, Euler, UniPC):
        full = [step.t for step in cls(steps=10)(gaussian(PUBLISHED), x, PUBLISHED)]
        assert [step.t for step in cls(steps=10, start=4)(gaussian(PUBLISHED), x, PUBLISHED)] == full[-4:]
    with pytest.raises(UserError, match="start is 11"):
        DDIM(steps=10, start=11)(gaussian(PUBLISHED), x, PUBLISHED)
