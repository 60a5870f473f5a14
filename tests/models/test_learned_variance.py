"""A network with twice the channels of the latents learns the variance of ancestral steps (arXiv 2102.09672)."""

import pytest
import tiny
import torch

from ldm.diffusion.cosine import Cosine
from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.objective import Objective, variance_nats
from ldm.errors import UserError
from ldm.networks.unet import UNet

PROCESS = DiscreteVP.linear(1000, 0.0015, 0.0195)


def training(**options):
    torch.manual_seed(0)
    network = UNet(tiny.CHANNELS, 2 * tiny.CHANNELS, **tiny.NETWORK)
    torch.nn.init.normal_(network.out[-1].weight, std=0.1)
    return tiny.latent_diffusion(network, tiny.autoencoder(), num_steps=20, **options)


def test_the_bound_is_that_of_its_gaussians():
    x0, eps, guess = torch.randn(3, 64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    share = torch.rand(64, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    t = torch.arange(64) * 15
    x_t = PROCESS.level(t).diffuse(x0, eps)
    total = 0.0
    for i in range(64):
        step, one = int(t[i]), slice(i, i + 1)
        true, made = (PROCESS.posterior(data[one], x_t[one], t[one]) for data in (x0, guess))
        low = PROCESS.tables["posterior_log_variance_clipped"][max(step, 1)]
        log_variance = low + share[one] * (PROCESS.tables["betas"][step].log() - low)
        normal = torch.distributions.Normal(made.mean, (log_variance / 2).exp())
        if step == 0:
            total -= normal.log_prob(x0[one]).mean()
        else:
            exact = torch.distributions.Normal(true.mean, true.variance.sqrt().expand_as(true.mean))
            total += torch.distributions.kl_divergence(exact, normal).mean()
    found = variance_nats(PROCESS, share, x0, x_t, guess, t)
    torch.testing.assert_close(found, 1000 * total / 64, rtol=1e-3, atol=1e-3)


def test_the_exact_posterior_is_the_optimum():
    """With the right mean, the best share of step t is that of the posterior: 0."""
    x0 = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300])
    shares = [variance_nats(PROCESS, torch.full_like(x0, share), x0, x0, x0, t).item() for share in (0.0, 0.3, 1.0)]
    assert shares[0] == pytest.approx(0.0, abs=1e-2) and shares[0] < shares[1] < shares[2]


def test_only_the_variance_learns_from_its_term():
    module = training(objective=Objective(simple_weight=0.0))
    z = torch.randn(2, tiny.CHANNELS, 8, 8)
    terms = module.model.loss(z, None, torch.tensor([3, 12]), torch.randn_like(z), module.objective)
    terms.loss.backward()
    grad = module.model.model.diffusion_model.out[-1].bias.grad
    assert (grad[: tiny.CHANNELS] == 0).all() and (grad[tiny.CHANNELS :] != 0).all()
    assert set(module.logs(terms)) == {"loss_simple", "loss", "loss_vlb", "loss_variance"}
    assert terms.loss.item() == pytest.approx(1e-3 * terms.variance.item(), rel=1e-5)


def test_samplers_draw_with_it_also_under_guidance():
    model = training().model.eval()
    images = model.sample(2, sampler="ddpm", steps=4)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    assert model.denoiser()(torch.zeros(2, tiny.CHANNELS, 8, 8), torch.tensor([5.0, 5.0])).share.shape == (2, 2, 8, 8)
    weaker = training().model.eval()
    guided = model.denoiser(None, 2.0, guide=weaker.denoiser())
    assert guided(torch.zeros(1, tiny.CHANNELS, 8, 8), torch.tensor([5.0])).share is not None


def test_a_variance_needs_steps():
    with pytest.raises(UserError, match="UNet: out_channels is 4.*variance.*set it to 2"):
        training(process=Cosine())
    with pytest.raises(UserError, match="variance_weight.*set out_channels to 4"):
        tiny.latent_diffusion(tiny.unet(), tiny.autoencoder(), objective=Objective(variance_weight=0.5))
    with pytest.raises(UserError, match="out_channels is 6"):
        tiny.latent_diffusion(UNet(2, 6, **tiny.NETWORK), tiny.autoencoder())
