"""Regularisers: the Gaussian against torch.distributions, the quantiser against its definition and taming's."""

import numpy as np
import pytest
import torch
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.autoencoder import regularizers
from ldm.autoencoder.regularizers import KL, DiagonalGaussian, Identity, VectorQuantizer, measure_perplexity, normal_kl
from ldm.errors import UserError


@pytest.fixture
def gaussians():
    """Give two pairs of ours and torch's Gaussians of shape (2, 3, 4, 4)."""
    pairs = []
    for _ in range(2):
        parameters = torch.randn(2, 6, 4, 4, dtype=torch.float64)
        mean, logvar = parameters.chunk(2, dim=1)
        pairs.append((DiagonalGaussian(parameters), Normal(mean, (logvar / 2).exp())))
    return pairs


def test_densities_and_divergences_in_closed_form(gaussians):
    (p, p_torch), (q, q_torch) = gaussians
    standard = Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean))
    z = torch.randn_like(p.mean)
    torch.testing.assert_close(p.kl(), kl_divergence(p_torch, standard).sum((1, 2, 3)))
    torch.testing.assert_close(p.kl(q), kl_divergence(p_torch, q_torch).sum((1, 2, 3)))
    torch.testing.assert_close(normal_kl(p.mean, p.logvar, q.mean, q.logvar), kl_divergence(p_torch, q_torch))
    torch.testing.assert_close(normal_kl(p.mean, p.logvar, 0.0, 0.0), kl_divergence(p_torch, standard))
    torch.testing.assert_close(p.nll(z), -p_torch.log_prob(z).sum((1, 2, 3)))
    torch.testing.assert_close(p.nll(z, dims=(1,)), -p_torch.log_prob(z).sum(1))


def test_samples_are_mean_plus_std_times_the_given_noise(gaussians):
    (p, _), _ = gaussians
    noise = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(p.sample(lambda shape: noise.view(shape)), p.mean + p.std * noise)
    assert torch.equal(p.mode(), p.mean)


def test_samples_have_the_right_moments_by_default():
    p = DiagonalGaussian(torch.tensor([2.0, -2.0]).view(1, 2, 1, 1).expand(50_000, 2, 1, 1))
    samples = p.sample()
    assert samples.mean() == pytest.approx(2.0, abs=0.01)
    assert samples.std() == pytest.approx(np.exp(-1.0), rel=0.02)


def test_log_variance_is_clamped():
    p = DiagonalGaussian(torch.tensor([0.0, 1e4, 0.0, -1e4]).view(2, 2, 1, 1))
    assert p.logvar.flatten().tolist() == [20.0, -30.0]
    assert p.kl().isfinite().all()


def test_a_deterministic_gaussian_is_its_mean(gaussians):
    p = DiagonalGaussian(gaussians[0][0].parameters, deterministic=True)
    assert torch.equal(p.sample(), p.mean) and not p.var.any()
    assert p.kl().tolist() == p.nll(p.mean).tolist() == [0.0]


def test_kl_sums_over_elements_and_averages_over_the_batch():
    h = torch.randn(4, 6, 2, 2, requires_grad=True)
    z, loss, info = KL()(h, torch.ones)
    p = DiagonalGaussian(h)
    torch.testing.assert_close(loss, p.kl().mean())
    torch.testing.assert_close(z, p.mean + p.std)
    torch.testing.assert_close(info["posterior_std"], p.std.mean())
    loss.backward()
    mean, logvar = h.detach().chunk(2, dim=1)
    torch.testing.assert_close(h.grad, torch.cat([mean, 0.5 * (logvar.exp() - 1)], dim=1) / 4)


def test_kl_is_computed_in_float32():
    h = (30 * torch.randn(2, 8, 16, 16)).half()
    z, loss, _ = KL()(h)
    assert z.dtype == loss.dtype == torch.float32
    assert loss > torch.finfo(torch.float16).max and loss.isfinite()


def test_kl_learns_from_samples_and_conditions_on_means():
    h, regularizer = torch.randn(1, 6, 2, 2), KL()
    torch.testing.assert_close(regularizer.latent(h, torch.ones), regularizer(h, torch.ones)[0])
    assert torch.equal(regularizer.mode(h), h[:, :3])
    z = torch.randn(1, 3, 2, 2)
    assert regularizer.nearest_codes(z) is z and regularizer.double_z


def test_identity_changes_nothing():
    h, regularizer = torch.randn(1, 3, 2, 2), Identity()
    z, loss, info = regularizer(h)
    assert z is h and loss == 0 and info == {} and not regularizer.double_z
    assert regularizer.latent(h) is h and regularizer.mode(h) is h and regularizer.nearest_codes(h) is h


# --- vector quantisation -----------------------------------------------------------------------------------------


def quantizers(num_codes=20, dim=3, **options):
    """Give ours and taming's quantiser with the same codebook, whose second half repeats the first."""
    ours, taming = VectorQuantizer(num_codes, dim, **options), VectorQuantizer2(num_codes, dim, 0.25, **options)
    codebook = torch.randn(num_codes, dim)
    codebook[num_codes // 2 :] = codebook[: num_codes - num_codes // 2]
    for quantizer in (ours, taming):
        quantizer.embedding.weight.data.copy_(codebook)
    return ours, taming


@pytest.mark.parametrize("budget", [1, 100, 2**24])
@pytest.mark.parametrize("options", [{}, {"legacy": False}, {"sane_index_shape": True}])
def test_agreement_with_taming_whatever_the_chunks(monkeypatch, budget, options):
    monkeypatch.setattr(regularizers, "SEARCH_BUDGET", budget)
    ours, taming = quantizers(**options)
    results = []
    z = torch.randn(2, 3, 6, 5)
    for quantizer in (ours, taming):
        leaf, cotangent = z.clone().requires_grad_(), torch.linspace(-1, 1, z.numel()).view_as(z)
        zq, loss, info = quantizer(leaf)
        indices = info["indices"] if isinstance(info, dict) else info[2]
        ((zq * cotangent).sum() + loss).backward()
        results.append((zq, loss, indices, leaf.grad, quantizer.embedding.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_ties_go_to_the_first_code():
    ours, _ = quantizers()
    assert ours.nearest(torch.randn(2, 3, 8, 8)).max() < 10


class LargestTensor(TorchDispatchMode):
    """Watch the number of elements of all results."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_search_is_bounded_in_memory(monkeypatch):
    monkeypatch.setattr(regularizers, "SEARCH_BUDGET", 4000)
    quantizer, z = VectorQuantizer(500, 3), torch.randn(1, 3, 32, 32)
    with LargestTensor() as largest:
        codes = quantizer.nearest(z)
    assert codes.shape == (1024,)
    assert largest.numel <= 4000


def test_codes_do_not_depend_on_autocast():
    quantizer, z = quantizers(num_codes=500)[0], torch.randn(1, 3, 16, 16)
    expected = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zq, loss, info = quantizer(z)
    assert torch.equal(info["indices"], expected[2]["indices"])
    assert loss.dtype == torch.float32 and torch.equal(loss, expected[1]) and torch.equal(zq, expected[0])


def test_half_precision_latents_keep_their_type():
    quantizer = quantizers()[0]
    zq, loss, _ = quantizer(torch.randn(1, 3, 4, 4).bfloat16())
    assert zq.dtype == torch.bfloat16 and loss.dtype == torch.float32


@pytest.mark.parametrize(("legacy", "on_latent", "on_codebook"), [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_beta_by_hand(legacy, on_latent, on_codebook):
    quantizer = VectorQuantizer(2, 1, legacy=legacy)
    quantizer.embedding.weight.data.copy_(torch.tensor([[0.0], [10.0]]))
    z = torch.tensor([1.0, 7.0]).view(1, 1, 1, 2).requires_grad_()
    _, loss, info = quantizer(z)
    loss.backward()
    assert info["indices"].tolist() == [0, 1]
    assert loss.item() == pytest.approx(1.25 * (1 + 9) / 2)
    assert z.grad.flatten().tolist() == pytest.approx([on_latent * 1.0, on_latent * -3.0])
    assert quantizer.embedding.weight.grad.flatten().tolist() == pytest.approx([on_codebook * -1.0, on_codebook * 3.0])


def test_snapping_is_idempotent_and_lets_gradients_through():
    quantizer = quantizers()[0]
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    quantized = quantizer.nearest_codes(z)
    torch.testing.assert_close(quantizer.nearest_codes(quantized), quantized)
    (gradient,) = torch.autograd.grad((2 * quantized).sum(), z)
    assert torch.equal(gradient, torch.full_like(z, 2.0))
    assert quantizer.latent(z) is z and quantizer.mode(z) is z


def test_entries_of_indices():
    quantizer = quantizers()[0]
    zq, _, info = quantizer(torch.randn(2, 3, 4, 5))
    torch.testing.assert_close(quantizer.codes(info["indices"], (2, 4, 5, 3)), zq)
    assert torch.equal(quantizer.codes(torch.tensor([3, 4])), quantizer.embedding.weight[3:5])


@pytest.fixture
def used(tmp_path):
    """Give a file that says which codes are in use, in no order."""
    np.save(tmp_path / "used.npy", np.array([7, 2, 11, 3]))
    return str(tmp_path / "used.npy")


@pytest.mark.parametrize(("unknown", "stand_in"), [("extra", 4), (1, 1)])
def test_remapped_indices(used, unknown, stand_in):
    quantizer = VectorQuantizer(12, 3, remap=used, unknown_index=unknown)
    assert list(quantizer.state_dict()) == ["used", "embedding.weight"]
    indices = torch.tensor([[2, 3, 0], [7, 9, 11]])
    expected = torch.tensor([[1, 3, stand_in], [0, stand_in, 2]])
    assert torch.equal(quantizer.remap_to_used(indices), expected)
    known = torch.tensor([[1, 3], [0, 2]])
    assert torch.equal(quantizer.codes(known), quantizer.embedding.weight[torch.tensor([[2, 3], [7, 11]])])


def test_unknown_indices_are_random_by_default(used):
    quantizer = VectorQuantizer(12, 3, remap=used)
    new = quantizer.remap_to_used(torch.zeros(1, 200, dtype=torch.long))
    assert set(new.flatten().tolist()) == {0, 1, 2, 3}


def test_entries_leave_the_callers_indices_alone(used):
    quantizer, indices = VectorQuantizer(12, 3, remap=used, unknown_index="extra"), torch.tensor([4, 1])
    assert torch.equal(quantizer.codes(indices), quantizer.embedding.weight[torch.tensor([7, 2])])
    assert indices.tolist() == [4, 1]


def test_a_remap_needs_its_file(tmp_path):
    with pytest.raises(UserError, match=r"VectorQuantizer\.remap: "):
        VectorQuantizer(12, 3, remap=str(tmp_path / "absent.npy"))


def test_codebook_starts_uniform():
    weight = VectorQuantizer(1000, 8).embedding.weight.detach()
    assert weight.abs().max() <= 1e-3 and weight.std() == pytest.approx(1e-3 / 3**0.5, rel=0.05)


def test_perplexity():
    perplexity, usage = measure_perplexity(torch.arange(8).repeat(3), 10)
    assert perplexity.item() == pytest.approx(8.0, rel=1e-4) and usage.item() == 8
    perplexity, usage = measure_perplexity(torch.zeros(5, 2, dtype=torch.long), 10)
    assert perplexity.item() == pytest.approx(1.0, rel=1e-4) and usage.item() == 1
    ours, _ = quantizers()
    _, _, info = ours(torch.randn(1, 3, 8, 8))
    assert info["usage"] == len(info["indices"].unique())
