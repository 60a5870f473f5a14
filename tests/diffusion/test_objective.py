"""The loss against its formula."""

import pytest
import torch

from ldm.diffusion.objective import Objective
from ldm.errors import UserError


def _inputs():
    output, target = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return output, target, torch.tensor([0, 2, 2])


def test_plain_loss_is_the_mean_error():
    output, target, t = _inputs()
    zeros = torch.zeros(4)
    squared = Objective("l2")(output, target, t, vlb_weights=zeros, logvar=zeros)
    absolute = Objective("l1")(output, target, t, vlb_weights=zeros, logvar=zeros)
    torch.testing.assert_close(squared.loss, torch.nn.functional.mse_loss(output, target))
    torch.testing.assert_close(absolute.loss, torch.nn.functional.l1_loss(output, target))
    assert squared.simple.shape == (3,)


def test_terms_add_up():
    output, target, t = _inputs()
    weights, logvar = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 0.0, -0.3, 0.0])
    terms = Objective("l2", simple_weight=0.5, elbo_weight=0.25)(output, target, t, vlb_weights=weights, logvar=logvar)
    expected = (terms.simple / logvar[t].exp() + logvar[t]).mean()
    torch.testing.assert_close(terms.gamma, expected)
    torch.testing.assert_close(terms.vlb, (weights[t] * terms.simple).mean())
    torch.testing.assert_close(terms.loss, 0.5 * terms.gamma + 0.25 * terms.vlb)


def test_best_logvar_is_the_log_error():
    """d/ds (l e^-s + s) = 0 at s = log l."""
    output, target, t = _inputs()
    logvar = torch.zeros(4, requires_grad=True)
    zeros = torch.zeros(4)
    simple = Objective()(output, target, t, vlb_weights=zeros, logvar=zeros).simple
    best = torch.tensor([simple[0].log(), 0.0, simple[1:].mean().log(), 0.0], requires_grad=True)
    Objective()(output, target, t, vlb_weights=zeros, logvar=best).loss.backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(logvar), atol=1e-6, rtol=0)


def test_unknown_loss_names_the_known_ones():
    with pytest.raises(UserError, match="l1, l2"):
        Objective("huber")
