"""The patch discriminator: published sizes, patches, initial values."""

import pytest
import torch

from ldm.networks.discriminator import PatchDiscriminator


@pytest.mark.parametrize(("num_layers", "size"), [(3, 2_765_633), (2, 663_361)])
def test_published_sizes(num_layers, size):
    model = PatchDiscriminator(num_layers=num_layers)
    assert sum(p.numel() for p in model.parameters()) == size
    assert all(name.startswith("main.") for name in model.state_dict())


def test_a_logit_sees_70_pixels():
    model = PatchDiscriminator(in_channels=1, width=4).eval()
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = model(x)
    assert logits.shape == (1, 1, 128 // 8 - 2, 128 // 8 - 2)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], x)
    rows = gradient[0, 0].abs().sum(dim=1).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_initial_values():
    torch.manual_seed(0)
    state = PatchDiscriminator().state_dict()
    assert state["main.5.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert state["main.3.weight"].mean() == pytest.approx(1.0, abs=0.01) and state["main.3.weight"].std() > 0.01
    assert not state["main.3.bias"].any()
    assert PatchDiscriminator(init_std=None).state_dict()["main.5.weight"].std() < 0.018


def test_actnorm_measures_the_first_training_batch():
    model = PatchDiscriminator(width=4, num_layers=2, actnorm=True)
    x = 3 * torch.randn(8, 3, 32, 32) + 1
    model.eval()(x)
    assert not model.state_dict()["main.3.initialized"]
    model.train()
    h = model.main[:4](x)
    assert model.state_dict()["main.3.initialized"]
    assert h.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(h.std(dim=(0, 2, 3)), torch.ones(8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("actnorm", [False, True])
def test_synchronised_norms_keep_names_and_values(actnorm):
    outputs, states = [], []
    for synchronized in (False, True):
        torch.manual_seed(0)
        model = PatchDiscriminator(width=4, num_layers=2, actnorm=actnorm, synchronized=synchronized)
        outputs.append(model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()))
        states.append(model.state_dict())
    assert torch.equal(*outputs) and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
