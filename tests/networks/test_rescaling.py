"""The relatives of encoder and decoder: embeddings in closed form, sizes, options, and errors."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.encoder_decoder import Architecture, Decoder
from ldm.networks.rescaling import (
    DiffusionModel,
    LatentRescaler,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
    Resize,
    SimpleDecoder,
    UpsampleDecoder,
    Upsampler,
    sinusoidal_embedding,
)

TINY = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 32, "resolution": 16}


def test_embedding_is_sine_then_cosine_with_both_end_points():
    t = torch.tensor([0, 3, 999])
    embedding = sinusoidal_embedding(t, 8)
    frequencies = [1.0, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4]
    expected = [[math.sin(i * f) for f in frequencies] + [math.cos(i * f) for f in frequencies] for i in t.tolist()]
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(sinusoidal_embedding(t, 9), torch.nn.functional.pad(embedding, (0, 1)))
    with pytest.raises(ValueError, match="dim 2"):
        sinusoidal_embedding(t, 2)


def test_diffusion_model_depends_on_time_and_context(randomised):
    model = randomised(DiffusionModel(Architecture(**TINY, in_channels=5, attention_resolutions=(8,))))
    x, context = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 16, 16)
    y = model(x, torch.tensor([1, 1]), context)
    assert y.shape == (2, 3, 16, 16)
    torch.testing.assert_close(y, model(torch.cat([x, context], dim=1), torch.tensor([1, 1])))
    assert not torch.allclose(y, model(x, torch.tensor([1, 500]), context))
    with pytest.raises(ValueError, match="t is missing"):
        model(x, None, context)


def test_diffusion_model_without_time_keeps_the_projections(randomised):
    model = randomised(DiffusionModel(Architecture(**TINY), use_timestep=False))
    assert "temb.dense.0.weight" not in model.state_dict()
    assert "mid.block_1.temb_proj.weight" in model.state_dict()
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("mult", [(1,), (1, 2, 2)])
def test_diffusion_model_keeps_the_size(mult):
    model = DiffusionModel(Architecture(**TINY | {"channel_mult": mult, "num_res_blocks": 2}))
    assert model(torch.randn(1, 3, 8, 12), torch.tensor([5])).shape == (1, 3, 8, 12)


def test_decoders_enlarge():
    x = torch.randn(1, 32, 4, 6)
    assert SimpleDecoder(32, 3)(x).shape == (1, 3, 8, 12)
    assert UpsampleDecoder(32, 3, 32, 1)(x).shape == (1, 3, 8, 12)
    assert UpsampleDecoder(32, 3, 32, 1, channel_mult=(2, 1, 1))(x).shape == (1, 3, 16, 24)


@pytest.mark.parametrize(("factor", "size"), [(1.5, (6, 9)), (0.5, (2, 3)), (1.0, (4, 6))])
def test_latents_are_rescaled_by_any_factor(factor, size):
    assert LatentRescaler(factor, 4, 32, 5, depth=1)(torch.randn(1, 4, 4, 6)).shape == (1, 5, *size)


def test_merged_encoder_and_decoder_undo_each_others_size():
    arch, x = Architecture(**TINY), torch.randn(1, 3, 16, 16)
    z = MergedRescaleEncoder(arch, 32, rescale_factor=0.5, rescale_module_depth=2)(x)
    assert z.shape == (1, 32, 4, 4)
    assert MergedRescaleDecoder(arch, rescale_factor=2.0)(z).shape == x.shape


@pytest.mark.parametrize(("in_size", "out_size"), [(4, 4), (4, 8), (4, 12), (6, 28)])
def test_upsampler_reaches_its_size(in_size, out_size):
    model = Upsampler(in_size, out_size, 32, 3, ch_mult=1)
    assert isinstance(model.decoder, Decoder)
    assert model(torch.randn(1, 32, in_size, in_size)).shape == (1, 3, out_size, out_size)


def test_resize():
    x = torch.randn(1, 2, 4, 4)
    assert Resize()(x) is x
    assert Resize()(x, 2.0).shape == (1, 2, 8, 8)
    assert torch.equal(Resize(mode="nearest")(x, 0.5), x[..., ::2, ::2])


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="learned"):
        Resize(learned=True)
    with pytest.raises(UserError, match="out_size"):
        Upsampler(8, 4, 32, 3)
    with pytest.raises(UserError, match="multiple of 4"):
        Upsampler(6, 27, 32, 3)
