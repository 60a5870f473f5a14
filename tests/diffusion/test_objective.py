"""The loss against its formula."""

import itertools
import math

import pytest
import torch

from ldm.diffusion.cosine import Cosine
from ldm.diffusion.discrete import DiscreteVP, rescale_zero_terminal_snr
from ldm.diffusion.edm import EDM
from ldm.diffusion.objective import Huber, Objective, PseudoHuber, Uncertainty
from ldm.diffusion.prediction import Epsilon, Flow, Preconditioned, Sample, Velocity
from ldm.diffusion.process import Shifted
from ldm.diffusion.rectified_flow import RectifiedFlow
from ldm.diffusion.times import LogitNormal, LogNormal, Stratified, Uniform
from ldm.diffusion.weighting import EDM as EDMWeighting
from ldm.diffusion.weighting import VLB, MinSNR, Sigmoid, SoftMinSNR, Unit
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
    with pytest.raises(UserError, match="hubert.*l1, l2, huber"):
        Objective("hubert")


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


PREDICTIONS = [Epsilon(), Sample(), Velocity(), Flow(), Preconditioned()]
PROCESSES = [DiscreteVP.linear(1000, 0.0015, 0.0195), Cosine(), RectifiedFlow(), EDM()]


def named(value):
    return type(value).__name__


def levels(process, count=7):
    """Return levels inside of the range, in double precision."""
    return process.level(process.from_uniform(torch.linspace(0.05, 0.95, count, dtype=torch.float64)).double())


def guessed(level):
    """Return data, noise, and what a wrong network says of them, as (x_0, eps) that belong to the same x_t."""
    x0, eps, wrong = torch.randn(3, len(level.time), 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    return x0, eps, Velocity().denoised(wrong, level.diffuse(x0, eps), level)


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize(("prediction", "space"), itertools.product(PREDICTIONS, PREDICTIONS), ids=named)
@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_the_loss_of_any_prediction_in_any_space(process, prediction, space, loss):
    level = levels(process)
    x0, eps, guess = guessed(level)
    output, target = prediction.target(*guess, level), prediction.target(x0, eps, level)
    found = Objective(loss, space=space).bind(process, prediction)(output, target, level).simple
    want = Objective(loss).bind(process, space)(space.target(*guess, level), space.target(x0, eps, level), level).simple
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)


WEIGHTS = [  # of the error of x_0, by s = sigma / alpha
    (MinSNR(5.0), lambda s: torch.minimum(s**-2, torch.tensor(5.0))),
    (SoftMinSNR(5.0), lambda s: 1 / (s**2 + 1 / 5.0)),
    (EDMWeighting(0.7), lambda s: (s**2 + 0.7**2) / (s * 0.7) ** 2),
    (Sigmoid(-1.5), lambda s: math.exp(-1.5) * torch.sigmoid(-2 * s.log() + 1.5)),
    (SoftMinSNR(math.exp(2.0)), lambda s: math.exp(2.0) * torch.sigmoid(-2 * s.log() - 2.0)),
    (VLB(), lambda s: s**-2 / 2),
]


@pytest.mark.parametrize("process", PROCESSES, ids=named)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=named)
@pytest.mark.parametrize(("weighting", "formula"), WEIGHTS, ids=lambda one: named(one))
def test_weightings_are_their_formulas_for_every_prediction(process, prediction, weighting, formula):
    level = levels(process)
    x0, eps, guess = guessed(level)
    error = (prediction.target(*guess, level) - prediction.target(x0, eps, level)).square().flatten(1).mean(1)
    want = formula((level.sigma / level.alpha).flatten()) * (guess.x0 - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(weighting(level, prediction) * error, want, rtol=1e-6, atol=1e-9)


def test_edm_weighting_is_the_unit_of_edm_preconditioning():
    torch.testing.assert_close(EDMWeighting(0.5)(levels(EDM()), Preconditioned(0.5)), torch.ones(7).double())


@pytest.mark.parametrize(
    ("process", "slope"),
    [
        (Cosine(), lambda t: 2 * math.pi / torch.sin(math.pi * t) * (0.9994 - 1e-3)),
        (RectifiedFlow(), lambda t: 2 / (t * (1 - t)) * (1 - 1e-3)),
        (EDM(), lambda t: torch.full_like(t, 2 * math.log(80 / 0.002))),
        (Shifted(RectifiedFlow(), 3.0), lambda t: 2 / (t * (1 - t)) * (1 - 1e-3)),
    ],
    ids=named,
)
def test_the_bound_in_continuous_time(process, slope):
    """1/2 -d lambda / du of the error of eps (Kingma et al., eq. 17), whatever density draws the times."""
    t = process.from_uniform(torch.linspace(0.02, 0.98, 9, dtype=torch.float64))
    weights = VLB().bound(process, Uniform())(process.level(t), Epsilon())
    torch.testing.assert_close(weights, slope(t) / 2, rtol=1e-6, atol=0)
    density = LogitNormal(0.3, 0.8)
    drawn = density(torch.linspace(0.02, 0.98, 9, dtype=torch.float64), process)
    z = (torch.special.logit((drawn - process.cleanest) / (process.noisiest - process.cleanest)) - 0.3) / 0.8
    if not isinstance(process, EDM):
        share = (drawn - process.cleanest) / (process.noisiest - process.cleanest)
        density_of = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / (0.8 * share * (1 - share))
        weights = VLB().bound(process, density)(process.level(drawn), Epsilon())
        torch.testing.assert_close(weights, slope(drawn) / 2 / density_of, rtol=1e-5, atol=0)


def test_the_bound_in_steps_is_that_of_ddpm():
    process = PROCESSES[0]
    t = torch.arange(1, 1000)
    weights = VLB().bound(process, Uniform())(process.level(t), Epsilon())
    # Equation 12 of DDPM in float64, from its own betas; the published tables are float32, and lose digits in 1 - abar.
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    posterior = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    exact = betas[1:] ** 2 / (2 * posterior * (1 - betas[1:]) * (1 - abar[1:]))
    for found in (process.vlb_weights()[1:], weights / 1000):
        torch.testing.assert_close(found.double(), exact, rtol=2e-4, atol=0)
    assert VLB().bound(process, Stratified())(process.level(t), Epsilon()).equal(weights)
    with pytest.raises(UserError, match="VLB.*Uniform"):
        Objective(weighting=VLB(), times=LogitNormal()).bind(process, Epsilon())
    with pytest.raises(UserError, match="VLB.*Uniform"):
        Objective(weighting=VLB()).bind(Shifted(process, 2.0), Epsilon())


def test_snr_and_zero_terminal_snr_are_those_of_diffusers():
    utils = pytest.importorskip("diffusers.training_utils")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as theirs

    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)  # theirs is summed in float32
    t = torch.arange(37, 1000, 37)  # at step 0 the published tables, float32, are 7e-6 off
    snr = PROCESSES[0].level(t.double()).log_snr.exp().flatten()
    torch.testing.assert_close(snr, utils.compute_snr(scheduler, t).double(), rtol=1e-6, atol=0)
    x0, eps = torch.randn(2, len(t), 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = Velocity().target(x0, eps, PROCESSES[0].level(t.double()))
    torch.testing.assert_close(velocity, scheduler.get_velocity(x0, eps, t), rtol=1e-6, atol=1e-6)
    rescaled = torch.from_numpy(rescale_zero_terminal_snr(betas.numpy()))
    torch.testing.assert_close(rescaled, theirs(betas), atol=1e-6, rtol=0)


def test_densities_are_those_of_diffusers():
    """Quantiles at given uniforms against many draws of theirs."""
    utils = pytest.importorskip("diffusers.training_utils")
    draws = utils.compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.4, logit_std=0.7, generator=torch.Generator().manual_seed(0)
    )
    u = torch.linspace(0.05, 0.95, 19)
    t = LogitNormal(0.4, 0.7)(u, RectifiedFlow(cleanest=0.0))
    torch.testing.assert_close(t, draws.quantile(u), atol=5e-3, rtol=0)
    torch.testing.assert_close(t, torch.sigmoid(0.4 + 0.7 * torch.special.ndtri(u)), atol=1e-6, rtol=0)
    t = LogNormal(-1.2, 1.2)(u.double(), EDM())
    torch.testing.assert_close(t, (1.2 * torch.special.ndtri(u.double()) - 1.2).exp(), atol=1e-6, rtol=1e-6)


def test_strata_take_turns_and_keep_the_density():
    density, numbers = Stratified(LogitNormal(), strata=8), torch.arange(3, 3 + 64)
    u = torch.rand(64, generator=torch.Generator().manual_seed(0))
    spread = density.spread(u, numbers)
    assert sorted((spread[8:16] * 8).long().tolist()) == list(range(8))
    assert ((spread * 8).long() == numbers % 8).all()
    torch.testing.assert_close(spread[5:], density.spread(u[5:], numbers[5:]))  # of a sample, not of its batch
    process = RectifiedFlow()
    torch.testing.assert_close(density(spread, process), LogitNormal()(spread, process))
    assert density.spread(torch.tensor([1 - 2.0**-24]), torch.tensor([7])).item() < 1
    with pytest.raises(UserError, match="strata is 0"):
        Stratified(strata=0)
    with pytest.raises(UserError, match="LogNormal"):
        Objective(times=Stratified(LogNormal(mean=20.0))).bind(EDM(), Preconditioned())


def test_huber_is_quadratic_then_linear():
    x = torch.tensor([-3.0, -0.1, 0.0, 0.2, 5.0])
    torch.testing.assert_close(Huber(0.5)(x), torch.tensor([1.375, 0.005, 0.0, 0.02, 2.375]))
    with pytest.raises(UserError, match="delta.*0"):
        Huber(0.0)
    found = Objective(Huber(0.5)).bind(PROCESS, Epsilon())(*_inputs()).simple
    assert (found < _bound("l2")(*_inputs()).simple / 2 + 1e-6).all()


def test_pseudo_huber_is_smooth_between_the_two():
    x = torch.tensor([-4.0, 0.0, 0.003, 4.0], dtype=torch.float64)
    torch.testing.assert_close(PseudoHuber(3.0)(x), torch.tensor([2.0, 0.0, 1.5e-6, 2.0], dtype=torch.float64))
    with pytest.raises(UserError, match="c of PseudoHuber is 0"):
        PseudoHuber(0.0)
    assert (_bound("pseudo_huber")(*_inputs()).simple < _bound("l1")(*_inputs()).simple).all()


class Tape:
    """Draws of samples 0, 1, ..., each call from a generator of its own."""

    numbers = torch.arange(2)

    def __init__(self):
        self.calls = 0

    def normal(self, shape):
        self.calls += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.calls))


def test_offset_noise_is_shared_by_the_places_of_a_channel():
    plain, offset = (Objective(offset_noise=amount).draw_noise(Tape(), (2, 3, 8, 8)) for amount in (0.0, 0.1))
    difference = offset - plain
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference))
    want = 0.1 * torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(difference[:, :, :1, :1], want, atol=1e-6, rtol=1e-4)


def test_learned_uncertainty_finds_the_log_error_of_each_level():
    process, objective = RectifiedFlow(), Objective(uncertainty=Uncertainty(64)).bind(RectifiedFlow(), Flow())
    level = process.level(torch.linspace(0.02, 0.98, 64))
    sizes = (0.2 + level.sigma) * torch.ones(64, 1, 4, 4)
    begin = objective(sizes, torch.zeros_like(sizes), level)
    torch.testing.assert_close(begin.loss, begin.simple.mean())  # u = 0
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        objective(sizes, torch.zeros_like(sizes), level).loss.backward()
        optimizer.step()
    torch.testing.assert_close(objective.uncertainty(level).detach(), begin.simple.log(), atol=0.15, rtol=0)
    assert "uncertainty.weight" in objective.state_dict()
    edge = process.level(torch.tensor([0.0, 1.0]))
    assert objective.uncertainty(edge).isfinite().all()


def test_what_has_no_effect_is_refused():
    for options, name in (
        ({"weighting": MinSNR()}, "weighting"),
        ({"uncertainty": Uncertainty()}, "uncertainty"),
    ):
        with pytest.raises(UserError, match=f"{name}.*simple_weight"):
            Objective(simple_weight=0.0, elbo_weight=1.0, **options)
    with pytest.raises(UserError, match="learn_logvar.*uncertainty"):
        Objective(learn_logvar=True, uncertainty=Uncertainty())
    for make in (lambda: SoftMinSNR(0.0), lambda: EDMWeighting(-1.0), lambda: MinSNR(math.nan)):
        with pytest.raises(UserError, match="must be above 0"):
            make()
    assert Unit()(levels(EDM()), Epsilon()).tolist() == [1.0] * 7
