"""Guidance against closed forms."""

import pytest
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.guidance import (
    classifier_free,
    correct_epsilon,
    extrapolated,
    extrapolation,
    gradient,
    guided,
    projected,
    rescaled,
)
from ldm.diffusion.prediction import Denoised, x0_from_eps

PROCESS = DiscreteVP.linear(100)


def constant(value):
    def denoise(x_t, t):
        eps = value.expand_as(x_t)
        return Denoised(x0_from_eps(eps, x_t, PROCESS.level(t)), eps)

    return denoise


def _pair(x_t, t):
    """Unconditional half predicts eps = 1, conditional half eps = 3."""
    eps = torch.cat([torch.full_like(half, value) for half, value in zip(x_t.chunk(2), (1.0, 3.0), strict=True)])
    return Denoised(x0_from_eps(eps, x_t, PROCESS.level(t)), eps)


@pytest.mark.parametrize(("scale", "eps"), [(0.0, 1.0), (1.0, 3.0), (2.5, 6.0)])
def test_classifier_free_is_linear_in_both_parts(scale, eps):
    x_t, t = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 80])
    guided = classifier_free(_pair, scale)(x_t, t)
    torch.testing.assert_close(guided.eps, torch.full_like(x_t, eps))
    torch.testing.assert_close(guided.x0, x0_from_eps(guided.eps, x_t, PROCESS.level(t)), atol=1e-4, rtol=1e-4)


def test_corrected_epsilon_and_x0_belong_together():
    x_t, t = torch.randn(2, 1, 2, 2), torch.tensor([10, 80])
    x0, eps = correct_epsilon(constant(torch.tensor(0.5)), PROCESS, lambda e, x, t: e + 0.1 * x)(x_t, t)
    torch.testing.assert_close(eps, 0.5 + 0.1 * x_t)
    _, alpha, sigma, _ = PROCESS.level(t)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_guidance_samples_the_product_of_two_gaussians(mode):
    """N(0, 1) data guided by p(y | x_t) = N(y; x_t, r) has the score of their product at every level."""
    y, r = 2.0, 0.25

    def standard_normal(x_t, t):
        sigma = PROCESS.level(t).sigma
        return Denoised(x_t, sigma * x_t)  # score = -x_t; only eps is used

    with mode():
        x_t, t = torch.linspace(-1, 1, 8).view(2, 1, 2, 2), torch.tensor([10, 80])
        guided = gradient(standard_normal, PROCESS, lambda x, t: -((y - x) ** 2).flatten(1).sum(1) / (2 * r), 1.0)
        eps = guided(x_t, t).eps
    sigma = PROCESS.level(t).sigma
    torch.testing.assert_close(-eps / sigma, -x_t + (y - x_t) / r, atol=1e-4, rtol=1e-4)


WHERE, SPREAD = 1.5, 0.6  # data of class +1 are N(WHERE, SPREAD^2), of class -1 N(-WHERE, SPREAD^2)


def of_class(sign):
    """Return the exact denoiser of one class."""

    def denoise(x_t, t):
        level = PROCESS.level(t)
        variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
        eps = level.sigma / variance * (x_t - sign * level.alpha * WHERE)
        return Denoised(x0_from_eps(eps, x_t, level), eps)

    return denoise


def of_both(x_t, t):
    """Denoise exactly where the class is not known: by the probabilities of the classes given x_t."""
    level = PROCESS.level(t)
    variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
    plus = torch.sigmoid(2 * level.alpha * WHERE * x_t / variance)
    parts = zip(of_class(1)(x_t, t), of_class(-1)(x_t, t), strict=True)
    return Denoised(*(plus * one + (1 - plus) * other for one, other in parts))


def log_density(x, t, signs):
    level = PROCESS.level(t)
    variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
    logs = [-((x - sign * level.alpha * WHERE) ** 2) / (2 * variance) for sign in signs]
    return torch.logsumexp(torch.stack(logs), dim=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -0.5])
def test_guided_score_of_two_gaussians(scale):
    """The score of p(x_t) (p(x_t | y) / p(x_t))^s, by differentiating the densities."""
    x_t = torch.linspace(-3, 3, 32, dtype=torch.float64).view(2, 1, 4, 4).requires_grad_()
    t = torch.tensor([12.0, 70.0], dtype=torch.float64)
    guided_eps = extrapolated(lambda x, t: (of_class(1)(x, t), of_both(x, t)), scale)(x_t, t).eps
    log = (1 - scale) * log_density(x_t, t, (1, -1)) + scale * log_density(x_t, t, (1,))
    (score,) = torch.autograd.grad(log.sum(), x_t)
    torch.testing.assert_close(-guided_eps / PROCESS.level(t).sigma, score, atol=1e-9, rtol=1e-9)


def pair_of(seed=0):
    toward, away = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return toward, away


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(phi):
    utils = pytest.importorskip("diffusers.guiders.guider_utils")
    toward, away = pair_of()
    want = utils.rescale_noise_cfg(away + 5.0 * (toward - away), toward, phi)
    torch.testing.assert_close(rescaled(extrapolation(5.0), phi)(toward, away), want)


@pytest.mark.parametrize(("eta", "norm", "momentum"), [(0.0, 2.5, -0.5), (1.0, 1e9, 0.0), (0.3, 1.0, -0.75)])
def test_projection_is_that_of_diffusers(eta, norm, momentum):
    apg = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    rule, buffer = projected(extrapolation(5.0), eta, norm, momentum), apg.MomentumBuffer(momentum)
    for seed in range(3):
        toward, away = pair_of(seed)
        # "original" is D_c + (s - 1) of the difference, as in the paper
        want = apg.normalized_guidance(toward, away, 4.0, buffer, eta, norm, use_original_formulation=True)
        torch.testing.assert_close(rule(toward, away), want)


@pytest.mark.parametrize("wrap", [lambda rule: rescaled(rule, 0.7), lambda rule: projected(rule, 0.0, 2.0, -0.5)])
def test_any_rule_keeps_x0_and_eps_together(wrap):
    x_t, t = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 80.0])
    denoise = guided(lambda x, t: (of_class(1)(x, t), of_both(x, t)), wrap(extrapolation(3.0)), PROCESS)
    x0, eps = denoise(x_t, t)
    torch.testing.assert_close(PROCESS.level(t).diffuse(x0, eps), x_t, atol=1e-5, rtol=1e-4)
