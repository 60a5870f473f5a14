"""The classifier of noisy latents, with each of its four heads."""

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.classifier import EncoderUNet
from ldm.networks.unet import UNetOptions

TINY = {
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


@pytest.mark.parametrize("pool", POOLS)
def test_logits_of_a_sample_depend_on_it_and_its_time_alone(randomised, pool):
    classifier = randomised(EncoderUNet(**TINY, pool=pool))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    logits = classifier(x, t)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(classifier(x[1:], t[1:]), logits[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(classifier(x, t.flip(0)), logits)
    assert not torch.allclose(classifier(x.flip(0), t), logits)


@pytest.mark.parametrize("pool", POOLS)
def test_gradient_with_respect_to_the_latent_exists_and_formats_agree(randomised, pool):
    classifier = randomised(EncoderUNet(**TINY, pool=pool))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    expected = classifier(x, t)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    logits = classifier.to(memory_format=torch.channels_last)(x, t)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    logits.log_softmax(-1)[:, 0].sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_fresh_adaptive_head_is_undecided():
    assert not EncoderUNet(**TINY)(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])).any()


def test_size_of_the_guided_imagenet_classifier():
    with torch.device("meta"):
        classifier = EncoderUNet(4, 1000, 256, 32, 2, (4, 2, 1), (1, 2, 4), num_head_channels=32, pool="attention")
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 111604200


def test_attention_has_one_head_unless_told(randomised):
    config = {name: value for name, value in TINY.items() if name != "num_head_channels"}
    assert EncoderUNet(**config).middle_block[1].num_heads == 1
    sequence = randomised(EncoderUNet(**config, options=UNetOptions(dims=1)))
    assert sequence(torch.randn(2, 3, 8), torch.tensor([1, 2])).shape == (2, 10)


@pytest.mark.parametrize("changes", [{"pool": "max"}, {"pool": "attention", "image_size": None}])
def test_impossible_heads_are_user_errors(changes):
    with pytest.raises(UserError, match="pool="):
        EncoderUNet(**(TINY | changes))
