"""What every sampler must satisfy; the implementations are found in ldm.sampling."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest
import torch

import ldm.sampling
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.process import Schedule
from ldm.errors import UserError
from ldm.sampling.base import SeededNoise, last

TOTAL = 24
SCHEDULE = Schedule.linear(TOTAL, 1e-3, 0.3)


def _implementations():
    for module in pkgutil.iter_modules(ldm.sampling.__path__, "ldm.sampling."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            is_called = any("__call__" in vars(base) for base in cls.__mro__)
            if cls.__module__ == module.name and dataclasses.is_dataclass(cls) and is_called:
                yield cls


SAMPLERS = sorted(_implementations(), key=lambda cls: cls.__name__)
BY_STEPS = [cls for cls in SAMPLERS if "steps" in {field.name for field in dataclasses.fields(cls)}]


def make(cls, steps):
    """Build a sampler that takes `steps` steps (DDPM: the last ones, as it has no sub-grid)."""
    return cls(steps=steps) if cls in BY_STEPS else cls(start=steps)


def point(x_t, t):
    """Denoise exactly for data that is 0.25 everywhere."""
    alpha, sigma = SCHEDULE.level(t)
    x0 = torch.full_like(x_t, 0.25)
    return Prediction(x0, (x_t - alpha * x0) / sigma)


def curved(x_t, t):
    """Some denoiser that is not linear."""
    alpha, sigma = SCHEDULE.level(t)
    eps = torch.tanh(x_t) * sigma
    return Prediction((x_t - sigma * eps) / alpha, eps)


def x_last(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_samplers_are_found():
    assert {"DDIM", "DDPM", "PLMS", "DPMSolver"} <= {cls.__name__ for cls in SAMPLERS}


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("steps", range(1, TOTAL + 1))
def test_exact_steps_and_exact_on_a_point_target(cls, steps):
    walk = list(make(cls, steps)(point, x_last(), SCHEDULE))
    assert len(walk) == len({step.t for step in walk}) == steps
    assert [step.t for step in walk] == sorted((step.t for step in walk), reverse=True)
    torch.testing.assert_close(walk[-1].x, torch.full_like(walk[-1].x, 0.25), atol=1e-4, rtol=0)
    assert all(step.x.shape == step.x0.shape == (2, 3, 4, 4) for step in walk)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_deterministic_given_the_noise(cls):
    runs = [last(make(cls, 6)(curved, x_last(), SCHEDULE, noise=SeededNoise([1, 2]))).x for _ in range(2)]
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_samples_of_a_batch_do_not_meet(cls):
    both = last(make(cls, 6)(curved, x_last(), SCHEDULE, noise=SeededNoise([1, 2]))).x
    alone = last(make(cls, 6)(curved, x_last()[1:], SCHEDULE, noise=SeededNoise([2]))).x
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_double_precision_stays(cls):
    noise = SeededNoise([1, 2], dtype=torch.float64)
    x = last(make(cls, 5)(curved, x_last(dtype=torch.float64), SCHEDULE, noise=noise)).x
    assert x.dtype == torch.float64 and x.isfinite().all()


@pytest.mark.parametrize("cls", SAMPLERS)
def test_hooks_are_called(cls):
    constrained, refined = [], 0

    def constrain(x_t, t):
        constrained.append(t)
        return x_t

    def refine(x0):
        nonlocal refined
        refined += 1
        return x0.clamp(-0.1, 0.1)

    walk = list(make(cls, 5)(curved, x_last(), SCHEDULE, refine=refine, constrain=constrain))
    assert [t[0].item() for t in constrained] == [step.t for step in walk]
    assert all(t.shape == (2,) and t.dtype == torch.long for t in constrained)
    assert refined >= 5 and all(step.x0.abs().max() <= 0.1 + 1e-6 for step in walk)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_constrain_reaches_the_state(cls):
    walk = list(make(cls, 5)(curved, x_last(), SCHEDULE, constrain=lambda x_t, t: torch.zeros_like(x_t)))
    other = list(make(cls, 5)(curved, x_last(), SCHEDULE))
    assert not torch.allclose(walk[-1].x, other[-1].x)


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -3, TOTAL + 1])
def test_impossible_steps_are_refused_at_the_call(cls, steps):
    with pytest.raises(UserError, match=f"use 1 to {TOTAL}"):
        make(cls, steps)(point, x_last(), SCHEDULE)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_a_sampler_is_a_value(cls):
    assert make(cls, 3) == make(cls, 3) and hash(make(cls, 3)) == hash(make(cls, 3))


@pytest.mark.parametrize("cls", BY_STEPS)
def test_spacing_may_be_named(cls):
    named = [step.t for step in cls(steps=4, spacing="compvis")(curved, x_last(), SCHEDULE)]
    assert named == [19, 13, 7, 1]
    with pytest.raises(UserError, match="spacing"):
        cls(steps=4, spacing="karras")(curved, x_last(), SCHEDULE)
