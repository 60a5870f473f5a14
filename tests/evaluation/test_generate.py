"""Samples of a model: one seed a sample, whatever the batches; conversion to bytes."""

import pytest
import torch

from ldm.conditioning.labels import ClassConditioner
from ldm.data.core.pixels import to_bytes_truncated
from ldm.diffusion.discrete import DiscreteVP
from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.generate import Request, generate
from ldm.models.inpainting import Known
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.networks.unet import UNet
from ldm.sampling.ddim import DDIM


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = UNet(1, 1, 32, num_res_blocks=1, attention_factors=(), channel_mult=(1,), num_heads=1, context_dim=8)
    torch.nn.init.normal_(network.out[2].weight)
    conditioner = ClassConditioner(4, 8, null_label=3)
    process = DiscreteVP.linear(10)
    return LatentDiffusion(network, IdentityAutoencoder(1), process, conditioner).eval()


def request(seeds, **options):
    labels = torch.tensor([seed % 3 for seed in seeds])
    return Request(seeds, (8, 8), {"class_label": labels}, **options)


def images(model, *args, **options):
    parts = list(generate(model, DDIM(3, eta=1.0), request(*args, **options)))
    return torch.cat([part.images for part in parts]), parts


def test_samples_depend_on_their_seeds_not_on_the_batches(model):
    whole, _ = images(model, range(5), scale=2.0, batch_size=5)
    parts, batches = images(model, range(5), scale=2.0, batch_size=2)
    assert [(part.first, part.seeds) for part in batches] == [(0, [0, 1]), (2, [2, 3]), (4, [4])]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    one, _ = images(model, [3], scale=2.0)
    torch.testing.assert_close(one[0], whole[3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[0], whole[3])


def test_pixels_stay_in_range_and_nothing_keeps_gradients(model):
    whole, _ = images(model, range(3))
    assert whole.abs().max() <= 1 + 1e-5 and not whole.requires_grad


def test_the_global_generator_is_left_alone(model):
    before = torch.get_rng_state()
    images(model, range(2))
    assert torch.equal(before, torch.get_rng_state())


def test_every_step_is_seen(model):
    seen = []
    list(generate(model, DDIM(3), request(range(3), batch_size=2), on_step=lambda step: seen.append(step.t)))
    assert len(seen) == 6


def test_half_precision_is_close(model):
    full, _ = images(model, range(2))
    half, _ = images(model, range(2), autocast=torch.bfloat16)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().mean() < 0.1


def test_mistakes_are_told(model):
    with pytest.raises(UserError, match="batch_size is 0"):
        request(range(2), batch_size=0)
    with pytest.raises(UserError, match="3 of 'caption' for 2 samples"):
        Request(range(2), (8, 8), {"caption": ["a", "b", "c"]})
    with pytest.raises(UserError, match="no 'class_label'"):
        list(generate(model, DDIM(3), Request(range(2), (8, 8))))


def test_samples_that_are_no_numbers_are_refused(model):
    weight = model.model.diffusion_model.out[2].weight
    kept = weight.detach().clone()
    weight.detach().fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        images(model, range(1))
    weight.detach().copy_(kept)


def test_bytes_are_clamped_and_truncated():
    values = torch.tensor([-9.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert to_bytes_truncated(values.view(1, 1, 1, 6)).flatten().tolist() == [0, 0, 127, 254, 255, 255]


def test_what_is_known_is_kept_and_the_hole_is_not_looked_at(model):
    labels, mask = torch.tensor([0, 1, 2]), -torch.ones(3, 1, 8, 8)
    mask[..., 2:5, 3:6] = 1
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    changed = torch.where(mask > 0, torch.zeros(1), images)

    def draw(known, batch_size):
        wanted = Request(range(3), (8, 8), {"class_label": labels}, batch_size=batch_size, known=known)
        return torch.cat([part.images for part in generate(model, DDIM(10), wanted)])

    drawn = draw(Known(images, mask), 3)
    torch.testing.assert_close(drawn, draw(Known(changed, mask), 2), atol=1e-5, rtol=1e-5)
    free = draw(None, 3)
    is_known = (mask <= 0).expand_as(drawn)
    assert (drawn - images)[is_known].abs().mean() < 0.3 * (free - images)[is_known].abs().mean()
