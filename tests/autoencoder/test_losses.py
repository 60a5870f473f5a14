"""Losses of the first stage: closed forms, reductions, which term moves which parameters and when, precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldm.autoencoder.losses import (
    Adversary,
    KLLoss,
    VQLoss,
    hinge_d_loss,
    hinge_d_loss_with_exemplar_weights,
    vanilla_d_loss,
)
from ldm.errors import UserError
from ldm.networks.discriminator import PatchDiscriminator
from ldm.networks.perceptual import LPIPS

START = 5


def patches(in_channels=3):
    """Give a small discriminator."""
    return PatchDiscriminator(in_channels=in_channels, width=4, num_layers=1)


@pytest.fixture(scope="module")
def perceptual() -> LPIPS:
    """Give a perceptual distance that needs no file."""
    return LPIPS(random_features=True)


@pytest.fixture
def decoded():
    """Give images, a reconstruction by a last layer (a convolution), and that layer."""
    x, h = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 5, 16, 16)
    layer = (0.1 * torch.randn(3, 5, 3, 3)).requires_grad_()
    return x, F.conv2d(h, layer, padding=1), layer


# --- closed forms --------------------------------------------------------------------------------------------------


def test_discriminator_losses():
    real, fake = torch.tensor([2.0, 0.5]).view(2, 1, 1, 1), torch.tensor([-3.0, 0.0]).view(2, 1, 1, 1)
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    logistic = [math.log1p(math.exp(v)) for v in (-2.0, -0.5, -3.0, 0.0)]
    assert vanilla_d_loss(real, fake).item() == pytest.approx(0.25 * sum(logistic))
    weighted = hinge_d_loss_with_exemplar_weights(real, fake, torch.tensor([1.0, 3.0]))
    assert weighted.item() == pytest.approx(0.5 * (3 * 0.5 / 4 + 3 * 1.0 / 4))


def test_kl_loss_sums_and_divides_by_the_batch(decoded):
    x, rec, layer = decoded
    loss, logs = KLLoss(kl_weight=0.5, logvar_init=0.3).generator(x, rec, torch.tensor(7.0), 0, layer)
    nll = ((x - rec).abs() / math.exp(0.3) + 0.3).sum() / 2
    torch.testing.assert_close(loss, nll + 3.5)
    torch.testing.assert_close(logs["rec_loss"], (x - rec).abs().mean().detach())
    torch.testing.assert_close(logs["nll_loss"], nll.detach())
    assert logs["kl_loss"] == 7.0 and logs["logvar"] == pytest.approx(0.3)


def test_vq_loss_averages(decoded):
    x, rec, layer = decoded
    codes = torch.tensor([0, 1, 1, 0])
    loss, logs = VQLoss(codebook_weight=2.0, num_codes=4, pixel_loss="l2").generator(
        x, rec, torch.tensor([0.25]), 0, layer, indices=codes
    )
    torch.testing.assert_close(loss, (x - rec).square().mean() + 0.5)
    assert logs["quant_loss"] == 0.25 and logs["cluster_usage"] == 2
    assert logs["perplexity"].item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("kind", [KLLoss, VQLoss])
def test_perceptual_distance_counts_at_every_pixel(decoded, perceptual, kind):
    x, rec, layer = decoded
    plain, _ = kind().generator(x, rec, torch.tensor(0.0), 0, layer)
    full, logs = kind(perceptual_loss=perceptual, perceptual_weight=0.5).generator(x, rec, torch.tensor(0.0), 0, layer)
    elements = x[0].numel() if kind is KLLoss else 1
    torch.testing.assert_close(full - plain, 0.5 * elements * perceptual(x, rec).mean())
    off, _ = kind(perceptual_loss=perceptual, perceptual_weight=0.0).generator(x, rec, torch.tensor(0.0), 0, layer)
    assert torch.equal(off, plain)
    if kind is VQLoss:
        torch.testing.assert_close(logs["p_loss"], perceptual(x, rec).mean().detach())


@pytest.mark.parametrize("kind", [KLLoss, VQLoss])
def test_pixel_weights(decoded, kind):
    x, rec, layer = decoded
    weights = torch.zeros(2, 1, 16, 16)
    weights[..., :8] = 2.0
    loss, logs = kind().generator(x, rec, torch.tensor(0.0), 0, layer, weights=weights)
    half, _ = kind().generator(x[..., :8], rec[..., :8], torch.tensor(0.0), 0, layer)
    torch.testing.assert_close(loss, half * (2 if kind is KLLoss else 1))
    torch.testing.assert_close(logs["nll_loss"], kind().generator(x, rec, torch.tensor(0.0), 0, layer)[0].detach())


# --- the balance of the adversarial term -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KLLoss, VQLoss])
@pytest.mark.parametrize("step", [0, START])
def test_balance_is_the_ratio_of_gradients_at_the_last_layer(decoded, kind, step):
    x, rec, layer = decoded
    loss = kind(START, discriminator=patches(), adversary=Adversary(weight=0.5, max_weight=1e9)).eval()
    value, logs = loss.generator(x, rec, torch.tensor(0.0), step, layer)
    nll, g_loss = loss.nll((x - rec).abs()), -loss.discriminator(rec).mean()
    norms = [torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (nll, g_loss)]
    torch.testing.assert_close(logs["d_weight"], 0.5 * norms[0] / (norms[1] + 1e-4))
    torch.testing.assert_close(logs["g_loss"], g_loss.detach())
    assert logs["disc_factor"] == (1.0 if step >= START else 0.0)
    torch.testing.assert_close(value, nll + logs["d_weight"] * logs["disc_factor"] * g_loss)


def test_balance_is_bounded(decoded):
    x, rec, layer = decoded
    loss = KLLoss(discriminator=patches(), adversary=Adversary(weight=0.5, max_weight=3.0))
    assert loss.generator(x, rec, torch.tensor(0.0), 0, layer)[1]["d_weight"] == 1.5


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_balance_without_gradients(decoded, context):
    x, rec, layer = decoded
    loss = KLLoss(discriminator=patches())
    with context():
        value, logs = loss.generator(x, rec.detach(), torch.tensor(0.0), 0, layer)
    assert logs["d_weight"] == 0.0 and logs["disc_factor"] == 1.0
    torch.testing.assert_close(value, logs["nll_loss"])
    assert loss.generator(x, rec, torch.tensor(0.0), 0, layer, split="val")[1]["d_weight"] == 0.0


def test_balance_survives_half_precision():
    x, h = torch.rand(2, 3, 32, 32), torch.randn(2, 4, 32, 32)
    layer = (0.1 * torch.randn(3, 4, 1, 1)).requires_grad_()
    weights = []
    for kind in (KLLoss, VQLoss):  # sums of 6144 elements, means of 1/6144 each
        torch.manual_seed(0)
        loss = kind(discriminator=patches(), adversary=Adversary(max_weight=1e9)).eval()
        for dtype in (torch.float32, torch.bfloat16):
            rec = F.conv2d(h.to(dtype), layer.to(dtype))
            weights.append(loss.generator(x, rec, torch.tensor(0.0), 0, layer)[1]["d_weight"])
    assert weights[1].item() == pytest.approx(weights[0].item(), rel=0.02)
    assert weights[3].item() == pytest.approx(weights[2].item(), rel=0.02)


# --- which term moves what ---------------------------------------------------------------------------------------


def moved(*modules):
    """Tell for each module whether any of its parameters has a gradient other than 0."""
    return tuple(any(p.grad is not None and bool(p.grad.any()) for p in m.parameters()) for m in modules)


@pytest.mark.parametrize(("step", "is_on"), [(0, False), (START - 1, False), (START, True), (START + 1, True)])
def test_generator_term_meets_the_adversary_from_disc_start(kl, perceptual, step, is_on):
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    gradients = []
    for discriminator in (None, patches()):
        kl.zero_grad()
        loss = KLLoss(START, kl_weight=1e-3, perceptual_loss=perceptual, discriminator=discriminator)
        rec, reg, _ = kl(x, torch.zeros)
        loss.generator(x, rec, reg, step, kl.last_layer)[0].backward()
        gradients.append([p.grad.clone() for p in kl.parameters()])
        assert moved(kl.encoder, kl.decoder, loss) == (True, True, True) and loss.logvar.grad != 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) is not is_on
    assert moved(loss.discriminator) == (is_on,)
    assert moved(perceptual) == (False,)


@pytest.mark.parametrize(("step", "is_on"), [(START - 1, False), (START, True)])
def test_discriminator_term_moves_the_discriminator_only(kl, perceptual, step, is_on):
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    loss = KLLoss(START, perceptual_loss=perceptual, discriminator=patches())
    value, logs = loss.discriminator_loss(x, kl(x)[0], step)
    value.backward()
    assert moved(kl, loss.discriminator, perceptual) == (False, is_on, False)
    assert loss.logvar.grad is None
    assert (value != 0) == is_on and (logs["disc_loss"] != 0) == is_on


def test_regulariser_moves_the_encoder_only(kl, vq):
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    for model in (kl, vq):
        model.zero_grad()
        rec, reg, _ = model(x)
        loss = KLLoss() if model is kl else VQLoss()
        loss.generator(x, rec, reg, 0, model.last_layer, weights=torch.zeros(1))[0].backward()
        assert moved(model.encoder, model.quant_conv) == (True, True)
        assert moved(model.decoder, model.post_quant_conv) == (False, False)
        assert moved(model.quantize) == (model is vq,)


def test_warmup_trains_the_discriminator_before_it_is_met(decoded):
    x, rec, layer = decoded
    loss = KLLoss(START, discriminator=patches(), adversary=Adversary(warmup=2))
    factors = [loss.generator(x, rec, torch.tensor(0.0), s, layer)[1]["disc_factor"].item() for s in range(3, 6)]
    trained = [bool(loss.discriminator_loss(x, rec, s)[0] != 0) for s in range(2, 6)]
    assert factors == [0.0, 0.0, 1.0] and trained == [False, True, True, True]


def test_ramp_lets_the_adversary_in_slowly(decoded):
    x, rec, layer = decoded
    loss = KLLoss(START, discriminator=patches(), adversary=Adversary(factor=2.0, ramp=4))
    steps = range(START - 1, START + 6)
    factors = [loss.generator(x, rec, torch.tensor(0.0), s, layer)[1]["disc_factor"].item() for s in steps]
    assert factors == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    full, slow = (KLLoss(0, discriminator=loss.discriminator, adversary=Adversary(ramp=ramp)) for ramp in (0, 4))
    terms = [each.discriminator_loss(x, rec, 0)[0] for each in (full, slow)]
    assert terms[0] == terms[1] > 0  # the discriminator trains at full weight


def test_a_synchronised_weight_of_one_rank_is_the_plain_one(decoded):
    x, rec, layer = decoded
    discriminator = patches().eval()
    weights = [
        VQLoss(discriminator=discriminator, adversary=Adversary(synchronized=flag))
        .generator(x, rec, torch.tensor(0.0), 0, layer)[1]["d_weight"]
        .item()
        for flag in (False, True)
    ]
    assert weights[1] == pytest.approx(weights[0], rel=1e-5)


# --- options -----------------------------------------------------------------------------------------------------


KL_LOGS = {"total_loss", "logvar", "kl_loss", "nll_loss", "rec_loss"}
VQ_LOGS = {"total_loss", "quant_loss", "nll_loss", "rec_loss", "p_loss"}


@pytest.mark.parametrize(("kind", "names"), [(KLLoss, KL_LOGS), (VQLoss, VQ_LOGS)])
def test_names_of_logs_and_absent_parts(decoded, kind, names):
    x, rec, layer = decoded
    bare, full = kind(), kind(discriminator=patches())
    assert set(bare.generator(x, rec, torch.tensor(0.0), 0, layer)[1]) == names
    logs = full.generator(x, rec, torch.tensor(0.0), 0, layer)[1]
    assert set(logs) == names | {"d_weight", "disc_factor", "g_loss"}
    assert not any(value.requires_grad for value in logs.values())
    value, logs = full.discriminator_loss(x, rec, 0)
    assert set(logs) == {"disc_loss", "logits_real", "logits_fake", "disc_accuracy"}
    value, logs = bare.discriminator_loss(x, rec, 0)
    assert value == 0 and logs == {} and set(bare.state_dict()) <= {"logvar"}


@pytest.mark.parametrize("kind", [KLLoss, VQLoss])
def test_factor_zero_takes_the_adversary_out(decoded, kind):
    x, rec, layer = decoded
    loss = kind(discriminator=patches(), adversary=Adversary(factor=0.0))
    value, logs = loss.generator(x, rec, torch.tensor(0.0), 0, layer)
    torch.testing.assert_close(value, kind().generator(x, rec, torch.tensor(0.0), 0, layer)[0])
    assert (logs["d_weight"] == 0) == (kind is KLLoss)
    assert loss.discriminator_loss(x, rec, 0)[0] == 0


def test_accuracy_counts_signs(decoded):
    x, rec, _ = decoded
    loss = KLLoss(discriminator=patches())
    with torch.no_grad():
        loss.discriminator.main[-1].weight.zero_()
        loss.discriminator.main[-1].bias.fill_(1.0)  # everything looks real
    logs = loss.discriminator_loss(x, rec, 0)[1]
    assert logs["disc_accuracy"] == 0.5 and logs["logits_real"] == logs["logits_fake"] == 1.0


def test_a_conditional_discriminator_sees_the_condition(decoded):
    x, rec, layer = decoded
    cond = torch.randn(2, 2, 16, 16)
    loss = VQLoss(discriminator=patches(5), adversary=Adversary(conditional=True, loss="vanilla")).eval()
    value, logs = loss.discriminator_loss(x, rec, 0, cond=cond)
    real, fake = (loss.discriminator(torch.cat([image, cond], dim=1)) for image in (x, rec))
    torch.testing.assert_close(value, vanilla_d_loss(real, fake))
    torch.testing.assert_close(
        loss.generator(x, rec, torch.tensor(0.0), 0, layer, cond=cond)[1]["g_loss"], -fake.mean().detach()
    )
    with pytest.raises(UserError, match="conditional: True"):
        loss.discriminator_loss(x, rec, 0)
    with pytest.raises(UserError, match="conditional: False"):
        VQLoss(discriminator=patches()).generator(x, rec, torch.tensor(0.0), 0, layer, cond=cond)


def test_losses_are_float32_under_autocast(decoded, perceptual):
    x, rec, layer = decoded
    torch.manual_seed(1)
    loss = KLLoss(perceptual_loss=perceptual, discriminator=patches()).eval()
    expected = loss.generator(x, rec, torch.tensor(1.0), 0, layer)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, logs = loss.generator(x, rec, torch.tensor(1.0), 0, layer)
        disc, _ = loss.discriminator_loss(x, rec, 0)
    assert value.dtype == disc.dtype == torch.float32 and all(v.dtype == torch.float32 for v in logs.values())
    torch.testing.assert_close(value, expected)


def test_sums_beyond_the_range_of_half_precision():
    x, rec = torch.zeros(1, 3, 256, 256).half(), torch.ones(1, 3, 256, 256).half()
    loss, _ = KLLoss().generator(x, rec, torch.tensor(0.0).half(), 0, rec)
    assert loss.item() == 3 * 256 * 256


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="hinge, vanilla"):
        Adversary(loss="wasserstein")
    with pytest.raises(UserError, match=r"Adversary\.ramp: -1 steps"):
        Adversary(ramp=-1)
    with pytest.raises(UserError, match=r"VQLoss\.pixel_loss"):
        VQLoss(pixel_loss="huber")
