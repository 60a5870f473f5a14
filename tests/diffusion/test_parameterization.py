"""Round trips between eps, x0 and v, and the weights of the bound."""

import pytest
import torch

from ldm.diffusion.prediction import Epsilon, Sample, Velocity
from ldm.diffusion.process import Schedule

ALL = [Epsilon(), Sample(), Velocity()]


@pytest.mark.parametrize("parameterization", ALL)
def test_the_exact_output_gives_back_data_and_noise(parameterization):
    schedule = Schedule.linear(100)
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 30, 70, 99])
    x_t = schedule.diffuse(x0, t, noise)
    prediction = parameterization.predict(schedule, parameterization.target(schedule, x0, noise, t), x_t, t)
    torch.testing.assert_close(prediction.x0, x0, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(prediction.eps, noise, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("parameterization", ALL)
def test_prediction_is_consistent_for_any_output(parameterization):
    schedule = Schedule.linear(100)
    x_t, output = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([5, 50, 99])
    x0, eps = parameterization.predict(schedule, output, x_t, t)
    alpha, sigma = schedule.level(t)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("other", [Sample(exact_vlb=True), Velocity()])
def test_vlb_term_does_not_depend_on_the_parameterization(other):
    """The same pair of predictions costs the same in every parameterization (t > 0)."""
    schedule = Schedule.linear(50)
    generator = torch.Generator().manual_seed(3)
    x0, noise, wrong = torch.randn(3, 49, 1, 2, 2, generator=generator)
    t = torch.arange(1, 50)
    x_t = schedule.diffuse(x0, t, noise)
    predicted = Epsilon().predict(schedule, wrong, x_t, t)

    def term(parameterization):
        error = parameterization.target(schedule, predicted.x0, predicted.eps, t) - parameterization.target(
            schedule, x0, noise, t
        )
        return parameterization.vlb_weights(schedule)[t] * (error**2).flatten(1).mean(1)

    torch.testing.assert_close(term(other), term(Epsilon()), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("parameterization", [*ALL, Sample(exact_vlb=True)])
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_weights_are_finite_and_positive(parameterization, num_steps):
    weights = parameterization.vlb_weights(Schedule.linear(num_steps))
    assert weights.dtype == torch.float32 and weights.shape == (num_steps,)
    assert weights.isfinite().all() and (weights >= 0).all()
    if num_steps > 1:
        assert weights[0] == weights[1]
