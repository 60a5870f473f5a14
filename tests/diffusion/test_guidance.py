"""Guidance against closed forms."""

import pytest
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.guidance import classifier_free, correct_epsilon, gradient
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
