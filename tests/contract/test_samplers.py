"""What every sampler must do, on every process and prediction; samplers are found by the names of their files."""

import math

import pytest
import torch

from ldm.diffusion.cosine import Cosine
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.prediction import (
    Denoised,
    Epsilon,
    Flow,
    Preconditioned,
    Sample,
    Velocity,
    check_prediction,
    eps_from_x0,
)
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.errors import UserError
from ldm.sampling import make_sampler, sampler_class, sampler_names
from ldm.sampling.base import SeededNoise, last

TOTAL = 24
PROCESS = DiscreteVP.linear(TOTAL, 1e-3, 0.3)
SAMPLERS = sampler_names()
PROCESSES = [
    DiscreteVP.linear(1000, 0.00085, 0.012),
    DiscreteVP.cosine(1000),
    DiscreteVP.linear(1000, 0.00085, 0.012, zero_terminal_snr=True),
    Cosine(),
    RectifiedFlow(),
    EDM(),
]
PREDICTIONS = [Epsilon(), Sample(), Velocity(), Flow(), Preconditioned()]
STD = 0.5

each_sampler = pytest.mark.parametrize("name", SAMPLERS)


def named(value):
    return type(value).__name__


def point(x_t, t):
    """Denoise exactly for data that is 0.25 everywhere."""
    level = PROCESS.level(t)
    x0 = torch.full_like(x_t, 0.25)
    return Denoised(x0, (x_t - level.alpha * x0) / level.sigma)


def curved(x_t, t):
    """Some denoiser that is not linear."""
    level = PROCESS.level(t)
    eps = torch.tanh(x_t) * level.sigma
    return Denoised((x_t - level.sigma * eps) / level.alpha, eps)


def x_last(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def gaussian(process, prediction):
    """Return the ideal denoiser of data N(0, STD^2), as a network of this prediction would have it."""

    def denoise(x_t, t):
        level = process.level(t)
        variance = (level.alpha * STD) ** 2 + level.sigma**2
        x0, eps = level.alpha * STD**2 / variance * x_t, level.sigma / variance * x_t
        return prediction.denoised(prediction.target(x0, eps, level), x_t, level)

    return denoise


def end_of_flow(process, prediction):
    """Return the ideal consistency function of data N(0, STD^2), as a network of this prediction would have it."""

    def denoise(x_t, t):
        level = process.level(t)
        x0 = STD / (((level.alpha * STD) ** 2 + level.sigma**2) ** 0.5) * x_t
        return prediction.denoised(prediction.target(x0, eps_from_x0(x0, x_t, level), level), x_t, level)

    return denoise


def test_samplers_are_found():
    assert {"ddim", "ddpm", "plms", "dpm_solver", "euler", "heun"} <= set(SAMPLERS)
    assert {"consistency", "dpm_solver_sde", "euler_ancestral", "unipc"} <= set(SAMPLERS)
    assert sampler_class("dpm_solver").__name__ == "DPMSolver"
    with pytest.raises(UserError, match="huen.*heun"):
        make_sampler("huen")
    with pytest.raises(UserError, match="heun.*eta"):
        make_sampler("heun", eta=0.5)


@each_sampler
@pytest.mark.parametrize("steps", range(1, TOTAL + 1))
def test_exact_steps_and_exact_on_a_point_target(name, steps):
    walk = list(make_sampler(name, steps=steps)(point, x_last(), PROCESS))
    assert len(walk) == len({step.t for step in walk}) == steps
    assert [step.t for step in walk] == sorted((step.t for step in walk), reverse=True)
    torch.testing.assert_close(walk[-1].x, torch.full_like(walk[-1].x, 0.25), atol=1e-4, rtol=0)
    assert all(step.x.shape == step.x0.shape == (2, 3, 4, 4) for step in walk)


@each_sampler
@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
@pytest.mark.parametrize(
    ("steps", "allowed"),
    [pytest.param(5, 2.5, marks=pytest.mark.slow), (10, 0.5), pytest.param(50, 0.12, marks=pytest.mark.slow)],
)
def test_right_on_every_process_and_prediction(name, process, prediction, steps, allowed):
    """The spread of the samples against the data's, on data N(0, 0.5^2); few steps of Heun on EDM are far off."""
    try:
        check_prediction(prediction, process)
    except UserError:
        return
    sampler = make_sampler(name, steps=steps)
    level = process.level(sampler.times(process)[:1])
    spread = math.hypot(level.alpha.item() * STD, level.sigma.item())
    x = spread * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=noise, dtype=torch.float64)  # noqa: E731
    ideal = end_of_flow if name == "consistency" else gaussian
    out = last(sampler(ideal(process, prediction), x, process, noise=draw)).x
    assert abs(out.std().item() / STD - 1) < allowed


@each_sampler
def test_deterministic_given_the_noise(name):
    runs = [last(make_sampler(name, steps=6)(curved, x_last(), PROCESS, noise=SeededNoise([1, 2]))).x for _ in range(2)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@each_sampler
def test_samples_of_a_batch_do_not_meet(name):
    both = last(make_sampler(name, steps=6)(curved, x_last(), PROCESS, noise=SeededNoise([1, 2]))).x
    alone = last(make_sampler(name, steps=6)(curved, x_last()[1:], PROCESS, noise=SeededNoise([2]))).x
    torch.testing.assert_close(both[1:], alone)


@each_sampler
def test_double_precision_stays(name):
    noise = SeededNoise([1, 2], dtype=torch.float64)
    x = last(make_sampler(name, steps=5)(curved, x_last(dtype=torch.float64), PROCESS, noise=noise)).x
    assert x.dtype == torch.float64 and x.isfinite().all()


@each_sampler
def test_hooks_act_at_one_place_in_all_samplers(name):
    """`constrain` before each step, at its time; `refine` on every prediction."""
    constrained, refined = [], 0

    def constrain(x_t, t):
        constrained.append(t)
        return x_t

    def refine(x0):
        nonlocal refined
        refined += 1
        return x0.clamp(-0.1, 0.1)

    walk = list(make_sampler(name, steps=5)(curved, x_last(), PROCESS, refine=refine, constrain=constrain))
    assert [t[0].item() for t in constrained] == pytest.approx([step.t for step in walk])
    assert all(t.shape == (2,) and t.dtype == torch.float32 for t in constrained)
    assert refined >= 5 and all(step.x0.abs().max() <= 0.1 + 1e-6 for step in walk)


@each_sampler
def test_constrain_reaches_the_state(name):
    walk = list(make_sampler(name, steps=5)(curved, x_last(), PROCESS, constrain=lambda x_t, t: torch.zeros_like(x_t)))
    other = list(make_sampler(name, steps=5)(curved, x_last(), PROCESS))
    assert not torch.allclose(walk[-1].x, other[-1].x)


@each_sampler
@pytest.mark.parametrize("steps", [0, -3, TOTAL + 1])
def test_impossible_steps_are_refused_at_the_call(name, steps):
    with pytest.raises(UserError, match=f"use 1 to {TOTAL}"):
        make_sampler(name, steps=steps)(point, x_last(), PROCESS)


@each_sampler
def test_a_sampler_is_a_value(name):
    assert make_sampler(name, steps=3) == make_sampler(name, steps=3)
    assert hash(make_sampler(name, steps=3)) == hash(make_sampler(name, steps=3))


@each_sampler
def test_grids_may_be_named(name):
    visited = [step.t for step in make_sampler(name, steps=4, grid="compvis")(curved, x_last(), PROCESS)]
    assert visited == [19, 13, 7, 1]
    with pytest.raises(UserError, match="kerras.*karras"):
        make_sampler(name, steps=4, grid="kerras")(curved, x_last(), PROCESS)
