"""Weights of the bound, and EDM's preconditioning against its table; round trips are in tests/contract."""

import pytest
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.objective import vlb_weights
from ldm.diffusion.prediction import Epsilon, Flow, Preconditioned, Sample, Velocity, check_prediction
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.errors import UserError

ALL = [Epsilon(), Sample(exact_vlb=True), Velocity(), Flow(), Preconditioned()]


@pytest.mark.parametrize("other", ALL[1:])
def test_vlb_term_does_not_depend_on_the_prediction(other):
    """The same x0 and eps cost the same whatever is predicted (t > 0)."""
    process = DiscreteVP.linear(50)
    x0, noise, wrong = torch.randn(3, 49, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    t = torch.arange(1, 50)
    level = process.level(t)
    found = Epsilon().denoised(wrong, level.diffuse(x0, noise), level)

    def term(prediction):
        error = prediction.target(found.x0, found.eps, level) - prediction.target(x0, noise, level)
        return vlb_weights(process, prediction)[t] * (error**2).flatten(1).mean(1)

    torch.testing.assert_close(term(other), term(Epsilon()), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("prediction", [*ALL, Sample()])
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_weights_are_finite_and_positive(prediction, num_steps):
    weights = vlb_weights(DiscreteVP.linear(num_steps), prediction)
    assert weights.dtype == torch.float32 and weights.shape == (num_steps,)
    assert weights.isfinite().all() and (weights >= 0).all()
    if num_steps > 1:
        assert weights[0] == weights[1]


def test_preconditioning_is_that_of_the_table():
    sigma, data = torch.tensor([0.01, 0.5, 40.0], dtype=torch.float64), 0.5
    level, x = EDM().level(sigma), torch.ones(3, 1, 1, 1, dtype=torch.float64)
    seen, time = Preconditioned(data).inputs(x, level)
    torch.testing.assert_close(seen.flatten(), 1 / (sigma**2 + data**2).sqrt())
    torch.testing.assert_close(time / 1000, sigma.log() / 4)
    skip = Preconditioned(data).denoised(torch.zeros_like(x), x, level).x0.flatten()
    out = Preconditioned(data).denoised(x, torch.zeros_like(x), level).x0.flatten()
    torch.testing.assert_close(skip, data**2 / (sigma**2 + data**2))
    torch.testing.assert_close(out, sigma * data / (sigma**2 + data**2).sqrt())


@pytest.mark.parametrize("process", [RectifiedFlow(), DiscreteVP.linear(10, zero_terminal_snr=True)])
def test_eps_is_refused_where_no_signal_is_left(process):
    with pytest.raises(UserError, match=f"Epsilon.*{type(process).__name__}.*zero terminal SNR"):
        check_prediction(Epsilon(), process)
    check_prediction(Velocity(), process)
