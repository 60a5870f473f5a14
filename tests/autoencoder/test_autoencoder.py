"""The first stage as a whole: latents, sizes, names, precision."""

import pytest
import torch

from ldm.autoencoder.regularizers import KL, Identity, VectorQuantizer
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.networks.encoder_decoder import Architecture


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 24) * 2 - 1


def test_kl_latents_are_samples_and_modes(kl, x):
    posterior = kl.posterior(x)
    assert kl.encode(x).shape == posterior.mean.shape == (2, *kl.latent_shape(16, 24))
    torch.testing.assert_close(kl.encode(x, torch.ones), posterior.mean + posterior.std)
    torch.testing.assert_close(kl.encode_mode(x), posterior.mean)
    assert not torch.equal(kl.encode(x), kl.encode(x))


def test_cached_moments_give_the_same_latents(kl, vq, x):
    for model in (kl, vq):
        torch.testing.assert_close(model.latent_from_moments(model.moments(x), torch.ones), model.encode(x, torch.ones))


def test_forward_is_encode_then_decode(kl, vq, x):
    reconstruction, loss, _ = kl(x, torch.ones)
    torch.testing.assert_close(reconstruction, kl.decode(kl.encode(x, torch.ones)))
    torch.testing.assert_close(loss, kl.posterior(x).kl().mean())
    reconstruction, _, info = vq(x)
    torch.testing.assert_close(reconstruction, vq.decode(vq.encode(x)))
    assert reconstruction.shape == x.shape and info["indices"].shape == (2 * 8 * 12,)


def test_vq_decoding_quantises_first(vq, x):
    z = vq.encode(x)
    assert torch.equal(z, vq.moments(x)) and torch.equal(z, vq.encode_mode(x))
    torch.testing.assert_close(vq.decode(z), vq.decode(vq.quantize.nearest_codes(z), quantize=False))
    assert not torch.allclose(vq.decode(z), vq.decode(z, quantize=False))
    with pytest.raises(TypeError, match="VectorQuantizer .*posterior"):
        vq.posterior(x)


def test_an_unregularised_autoencoder(make, x):
    model = make(Identity())
    reconstruction, loss, info = model(x)
    assert loss == 0 and info == {}
    torch.testing.assert_close(reconstruction, model.decode(model.encode(x)))


def test_names_are_the_published_ones(kl, vq):
    assert {name.split(".")[0] for name in kl.state_dict()} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert set(vq.state_dict()) == set(kl.state_dict()) | {"quantize.embedding.weight"}
    assert kl.state_dict()["quant_conv.weight"].shape == (6, 8, 1, 1)
    assert vq.state_dict()["quant_conv.weight"].shape == (3, 4, 1, 1)
    assert kl.last_layer is kl.decoder.conv_out.weight


@pytest.mark.parametrize(
    ("regularizer", "config", "embed_dim", "size"),
    [
        (KL, {"channel_mult": (1, 2, 4, 4), "z_channels": 4}, 4, 83_653_863),
        (lambda: VectorQuantizer(8192, 3), {"z_channels": 3}, 3, 55_322_782),
        (
            lambda: VectorQuantizer(16384, 8),
            {"channel_mult": (1, 1, 2, 2, 4), "z_channels": 8, "attention_resolutions": (16,)},
            8,
            69_593_371,
        ),
    ],
)
def test_published_sizes(regularizer, config, embed_dim, size):
    with torch.device("meta"):
        model = Autoencoder(Architecture(**config), regularizer(), embed_dim)
    assert sum(p.numel() for p in model.parameters()) == size


def test_illegal_sizes_are_refused_with_the_nearest_legal_ones(kl):
    assert kl.latent_shape(16, 30) == (3, 8, 15)
    with pytest.raises(UserError, match="2; .*16, 18, 30, 32"):
        kl.latent_shape(17, 31)
    with pytest.raises(UserError, match="the nearest are 2"):
        kl.latent_shape(16, 0)


def test_half_precision_weights_decode_float32_latents(kl, x):
    z = kl.encode_mode(x)
    expected = kl.decode(z)
    decoded = kl.bfloat16().decode(z)
    assert decoded.dtype == torch.bfloat16
    assert (decoded.float() - expected).norm() < 0.1 * expected.norm()


def test_latents_are_float32_under_autocast(kl, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kl.encode(x).dtype == torch.float32


def test_tanh_bounds_the_reconstruction(make, x):
    model = make(tanh_out=True)
    with torch.no_grad():
        model.last_layer.mul_(1000)
    assert model(x)[0].abs().max() <= 1


def test_gradients_reach_every_parameter(kl, vq, x):
    for model in (kl, vq):
        reconstruction, loss, _ = model(x)
        (reconstruction.square().mean() + loss).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.ndim > 1)


def test_identity_autoencoder_is_pixel_space(x):
    model = IdentityAutoencoder()
    assert model.factor == 1 and model.latent_shape(5, 7) == (3, 5, 7) and not list(model.state_dict())
    for y in (model.encode(x), model.encode_mode(x), model.moments(x), model.decode(x), model.latent_from_moments(x)):
        assert y is x
    reconstruction, loss, info = model(x)
    assert reconstruction is x and loss == 0 and info == {}
