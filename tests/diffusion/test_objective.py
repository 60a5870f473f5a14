"""The loss against its formula."""

import pytest
import torch

from ldm.diffusion.discrete import DiscreteVP
from ldm.diffusion.edm import EDM
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Epsilon, Flow, Preconditioned, Sample, Velocity
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.diffusion.times import LogNormal
from ldm.diffusion.weighting import MinSNR
from ldm.errors import UserError

PROCESS = DiscreteVP.linear(4)


def _inputs():
    output, target = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return output, target, PROCESS.level(torch.tensor([0, 2, 2]))


def _bound(*args, **options):
    return Objective(*args, **options).bind(PROCESS, Epsilon())


def test_plain_loss_is_the_mean_error():
    output, target, level = _inputs()
    squared, absolute = _bound("l2")(output, target, level), _bound("l1")(output, target, level)
    torch.testing.assert_close(squared.loss, torch.nn.functional.mse_loss(output, target))
    torch.testing.assert_close(absolute.loss, torch.nn.functional.l1_loss(output, target))
    assert squared.simple.shape == (3,)


def test_terms_add_up():
    output, target, level = _inputs()
    objective = _bound("l2", simple_weight=0.5, elbo_weight=0.25)
    objective.logvar.copy_(torch.tensor([0.1, 0.0, -0.3, 0.0]))
    terms, logvar = objective(output, target, level), objective.logvar[level.time]
    torch.testing.assert_close(terms.gamma, (terms.simple / logvar.exp() + logvar).mean())
    torch.testing.assert_close(terms.vlb, (objective.vlb_weights[level.time] * terms.simple).mean())
    torch.testing.assert_close(terms.loss, 0.5 * terms.gamma + 0.25 * terms.vlb)


def test_best_logvar_is_the_log_error():
    """d/ds (l e^-s + s) = 0 at s = log l."""
    output, target, level = _inputs()
    simple = _bound()(output, target, level).simple
    objective = _bound(learn_logvar=True)
    best = torch.tensor([simple[0].log(), 0.0, simple[1:].mean().log(), 0.0])
    objective.logvar.data.copy_(best)
    objective(output, target, level).loss.backward()
    torch.testing.assert_close(objective.logvar.grad, torch.zeros(4), atol=1e-6, rtol=0)


def test_only_a_learned_logvar_is_state():
    assert list(_bound().state_dict()) == [] and list(_bound(learn_logvar=True).state_dict()) == ["logvar"]


def test_unknown_loss_names_the_known_ones():
    with pytest.raises(UserError, match="huber.*l1, l2"):
        Objective("huber")


@pytest.mark.parametrize("options", [{"elbo_weight": 0.1}, {"learn_logvar": True}])
def test_terms_of_steps_are_refused_by_a_continuous_process(options):
    with pytest.raises(UserError, match=f"{next(iter(options))}.*RectifiedFlow"):
        Objective(**options).bind(RectifiedFlow(), Flow())


def test_a_density_outside_of_the_process_is_refused():
    with pytest.raises(UserError, match="LogNormal.*100%.*DiscreteVP"):
        Objective(times=LogNormal(mean=20.0)).bind(DiscreteVP.linear(1000, 0.0015, 0.0195), Epsilon())
    Objective(times=LogNormal()).bind(EDM(), Preconditioned())


@pytest.mark.parametrize("prediction", [Sample(), Velocity(), Flow(), Preconditioned()])
def test_min_snr_weighs_the_same_pair_alike_for_every_prediction(prediction):
    """min(SNR, gamma) of the error of x0, whatever is predicted (Hang et al., section 3.4)."""
    level = DiscreteVP.linear(1000, 0.0015, 0.0195).level(torch.tensor([10, 300, 900]))
    x0, eps, wrong = torch.randn(3, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guess = Epsilon().denoised(wrong, level.diffuse(x0, eps), level)

    def weighted(kind):
        error = kind.target(guess.x0, guess.eps, level) - kind.target(x0, eps, level)
        return MinSNR(5.0)(level, kind) * (error**2).flatten(1).mean(1)

    snr = ((level.alpha / level.sigma) ** 2).flatten()
    want = snr.clamp(max=5.0) * ((guess.x0 - x0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(weighted(prediction), want, rtol=1e-4, atol=1e-8)
