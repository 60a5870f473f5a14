"""Closed forms and invariances of the schedule tables."""

import numpy as np
import pytest
import torch

from ldm.diffusion import discrete as schedules
from ldm.diffusion.discrete import DiscreteVP
from ldm.errors import UserError

BUILDERS = [DiscreteVP.linear, DiscreteVP.sqrt_linear, DiscreteVP.sqrt, DiscreteVP.cosine]


@pytest.mark.parametrize("build", BUILDERS)
def test_signal_to_noise_ratio_falls(build):
    schedule = build(num_steps=200)
    snr = schedule.tables["alphas_cumprod"].double() / (1 - schedule.tables["alphas_cumprod"].double())
    assert (snr.diff() < 0).all()
    assert schedule.num_steps == 200


@pytest.mark.parametrize("build", BUILDERS)
def test_tables_are_float32_vectors_of_one_length(build):
    for name, table in build(num_steps=7).buffers().items():
        assert table.dtype == torch.float32 and table.shape == (7,), name


def test_published_linear_is_square_of_linspace_of_roots():
    betas = schedules.linear_betas(11, 0.0015, 0.0195)
    np.testing.assert_allclose(np.diff(np.sqrt(betas)), np.diff(np.sqrt(betas))[0])
    assert betas[0] == pytest.approx(0.0015) and betas[-1] == pytest.approx(0.0195)


def test_level_is_variance_preserving_and_minus_one_is_clean():
    schedule = DiscreteVP.linear(50)
    _, alpha, sigma, _ = schedule.level(torch.tensor([-1, 0, 49]))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3, 1, 1, 1))
    assert alpha[0] == 1 and sigma[0] == 0


def test_diffuse_matches_its_moments():
    schedule = DiscreteVP.linear(1000)
    t = torch.full((4000,), 400)
    x0 = torch.full((4000, 1, 2, 2), 0.7)
    x_t = schedule.level(t).diffuse(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)))
    mean, variance, log_variance = schedule.diffusion_moments(x0, t)
    assert x_t.mean() == pytest.approx(mean.mean().item(), abs=0.02)
    assert x_t.var() == pytest.approx(variance[0].item(), rel=0.05)
    torch.testing.assert_close(log_variance.exp(), variance)


def test_posterior_agrees_with_bayes_rule():
    """q(x_{t-1} | x_t, x0) from the product of two Gaussians, in float64."""
    schedule = DiscreteVP.sqrt_linear(20)
    betas = schedules.sqrt_linear_betas(20, 1e-4, 2e-2)
    abar, t = np.cumprod(1 - betas), 12
    x0, x_t = 0.3, -1.1
    precision = (1 - betas[t]) / betas[t] + 1 / (1 - abar[t - 1])
    mean = (np.sqrt(1 - betas[t]) * x_t / betas[t] + np.sqrt(abar[t - 1]) * x0 / (1 - abar[t - 1])) / precision
    got = schedule.posterior(torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), x_t), torch.tensor([t]))
    assert got.mean.item() == pytest.approx(mean, rel=1e-5)
    assert got.variance.item() == pytest.approx(1 / precision, rel=1e-5)
    assert got.log_variance.item() == pytest.approx(np.log(1 / precision), rel=1e-5)


def test_posterior_weight_reaches_beta():
    schedule = DiscreteVP.linear(30, posterior_weight=1.0)
    torch.testing.assert_close(schedule.tables["posterior_variance"], schedule.tables["betas"])


def test_cosine_betas_are_bounded():
    betas = schedules.cosine_betas(100)
    assert betas.max() <= 0.999 and betas.min() > 0


def test_the_published_schedules_end_in_noise():
    x0 = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    assert (DiscreteVP.linear(1000, 0.0015, 0.0195).prior_bits_per_dim(x0) < 1e-4).all()
    assert (DiscreteVP.linear(10).prior_bits_per_dim(x0) > 0.01).all()


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.0], [[0.1]]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(UserError, match="betas"):
        DiscreteVP.from_betas(np.array(betas))


def test_no_steps_are_refused():
    with pytest.raises(UserError, match="num_steps"):
        DiscreteVP.linear(0)


def test_to_keeps_the_numbers():
    schedule = DiscreteVP.linear(5)
    assert schedule.to("meta").tables["betas"].device.type == "meta"
    torch.testing.assert_close(schedule.to("cpu").tables["betas"], schedule.tables["betas"])


@pytest.mark.parametrize("build", BUILDERS)
def test_between_steps_the_log_snr_is_interpolated_and_at_steps_it_is_the_table(build):
    schedule = build(num_steps=40)
    whole = torch.arange(40)
    at, exact = schedule.level(whole.float()), schedule.level(whole)
    assert torch.equal(at.alpha, exact.alpha) and torch.equal(at.sigma, exact.sigma)
    between = schedule.level(whole[:-1].double() + 0.25).log_snr.flatten()
    ends = schedule.level(whole.double()).log_snr.flatten()
    torch.testing.assert_close(between, 0.75 * ends[:-1] + 0.25 * ends[1:])


def test_float64_levels_are_those_of_the_float32_table_of_abar():
    schedule = DiscreteVP.linear(10)
    level = schedule.level(torch.arange(10, dtype=torch.float64))
    assert torch.equal(level.alpha.flatten(), schedule.tables["alphas_cumprod"].double().sqrt())


def test_noise_grows_from_clean_data_to_step_zero():
    sigma = DiscreteVP.linear(10).level(torch.tensor([-1.0, -0.5, 0.0])).sigma.flatten()
    assert sigma[0] == 0 and sigma[1] == pytest.approx(sigma[2].item() / 2)


@pytest.mark.parametrize("build", [DiscreteVP.linear, DiscreteVP.sqrt_linear, DiscreteVP.cosine])
def test_zero_terminal_snr_leaves_no_signal_and_keeps_the_first_step(build):
    plain, rescaled = build(num_steps=100), build(num_steps=100, zero_terminal_snr=True)
    first, last = (rescaled.level(torch.tensor([step])) for step in (0, 99))
    assert last.alpha.item() == 0 and last.sigma.item() == 1
    torch.testing.assert_close(first.alpha, plain.level(torch.tensor([0])).alpha, rtol=1e-6, atol=0)
    alphas = [process.tables["sqrt_alphas_cumprod"].double() for process in (plain, rescaled)]
    shifted = (alphas[0] - alphas[0][-1]) / (alphas[0][0] - alphas[0][-1]) * alphas[0][0]  # algorithm 1
    torch.testing.assert_close(alphas[1], shifted, atol=1e-6, rtol=1e-5)


def test_tables_come_from_the_buffers_of_a_checkpoint():
    other = DiscreteVP.cosine(10)
    loaded = DiscreteVP.linear(10).with_buffers(other.buffers())
    torch.testing.assert_close(loaded.level(torch.arange(10)).alpha, other.level(torch.arange(10)).alpha)
