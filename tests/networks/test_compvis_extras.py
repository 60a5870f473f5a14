"""Networks of CompVis' code without a released model: embeddings in closed form, sizes, options, and errors."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.compvis_extras import (
    DiffusionModel,
    EncoderUNet,
    LatentRescaler,
    MergedRescaleDecoder,
    MergedRescaleEncoder,
    SimpleDecoder,
    UpsampleDecoder,
    sinusoidal_embedding,
)
from ldm.networks.encoder_decoder import Architecture
from ldm.networks.unet import UNetOptions

TINY = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 32, "resolution": 16}
CLASSIFIER = {
    "in_channels": 3,
    "out_channels": 10,
    "model_channels": 32,
    "image_size": 8,
    "num_res_blocks": 1,
    "attention_factors": (2,),
    "channel_mult": (1, 2),
    "num_head_channels": 16,
}
POOLS = ["adaptive", "attention", "spatial", "spatial_v2"]


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


@pytest.mark.parametrize("pool", POOLS)
def test_logits_of_a_sample_depend_on_it_and_its_time_alone(randomised, pool):
    classifier = randomised(EncoderUNet(**CLASSIFIER, pool=pool))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    logits = classifier(x, t)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(classifier(x[1:], t[1:]), logits[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(classifier(x, t.flip(0)), logits)
    assert not torch.allclose(classifier(x.flip(0), t), logits)


@pytest.mark.parametrize("pool", POOLS)
def test_gradient_with_respect_to_the_latent_exists_and_formats_agree(randomised, pool):
    classifier = randomised(EncoderUNet(**CLASSIFIER, pool=pool))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = classifier(x, t)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = classifier.to(memory_format=torch.channels_last)(x, t)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits.log_softmax(-1)[:, 0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_fresh_adaptive_head_is_undecided():
    assert not EncoderUNet(**CLASSIFIER)(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).any()


def test_size_of_the_guided_imagenet_classifier():
    with torch.device("meta"):
        classifier = EncoderUNet(4, 1000, 256, 32, 2, (4, 2, 1), (1, 2, 4), num_head_channels=32, pool="attention")
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 111604200


def test_attention_has_one_head_unless_told(randomised):
    config = {name: value for name, value in CLASSIFIER.items() if name != "num_head_channels"}
    assert EncoderUNet(**config).middle_block[1].num_heads == 1
    sequence = randomised(EncoderUNet(**config, options=UNetOptions(dims=1)))
    assert sequence(torch.randn(2, 3, 8), torch.tensor([1, 2])).shape == (2, 10)


@pytest.mark.parametrize("changes", [{"pool": "max"}, {"pool": "attention", "image_size": None}])
def test_impossible_heads_are_user_errors(changes):
    with pytest.raises(UserError, match="pool="):
        EncoderUNet(**(CLASSIFIER | changes))
