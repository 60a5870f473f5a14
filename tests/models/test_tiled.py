"""Models that work tile by tile: the same where one tile is enough, near where many are, and with finite borders."""

import pytest
import tiny
import torch
from torch import nn

from ldm.autoencoder.regularizers import KL, VectorQuantizer
from ldm.conditioning.base import Conditioning
from ldm.conditioning.images import FirstStageConditioner
from ldm.conditioning.labels import ClassConditioner
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditional_network import ConditionalNetwork
from ldm.models.tiled import TiledAutoencoder, TiledConditioner, TiledNetwork, tile, tile_boxes
from ldm.networks.encoder_decoder import Architecture
from ldm.networks.unet import UNet


def autoencoder(regularizer):
    torch.manual_seed(0)
    architecture = Architecture(channels=32, channel_mult=(1, 1), num_res_blocks=1, z_channels=4, attention="none")
    return Autoencoder(architecture, regularizer, embed_dim=4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def kl():
    return autoencoder(KL())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    unet = UNet(4, 2, 32, num_res_blocks=1, attention_factors=(), channel_mult=(1, 2), num_heads=1, context_dim=8)
    for parameter in unet.parameters():
        if parameter.dim() > 1 and not parameter.any():  # what starts at 0 hides the rest
            nn.init.normal_(parameter, std=0.1)
    return ConditionalNetwork(unet).eval().requires_grad_(False)


def test_one_tile_is_the_whole(kl):
    x, z, tiles = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 8, 12), TiledAutoencoder(kl, 16)
    torch.testing.assert_close(tiles.encode_mode(x), kl.encode_mode(x))
    torch.testing.assert_close(tiles.decode(z), kl.decode(z))
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 4, 8, 12, generator=draw)
    torch.testing.assert_close(tiles.encode(x, lambda shape: noise), kl.encode(x, lambda shape: noise))


def test_tiles_equal_the_whole_away_from_their_borders():
    """A decoder without global statistics, whose outputs depend on the 3 nearest latents, is exact there."""
    torch.manual_seed(0)
    model = autoencoder(KL())
    kernel = torch.randn(3, 4, 7, 7)
    transposed = kernel.transpose(0, 1)
    model.decode = lambda z, quantize=True: nn.functional.conv_transpose2d(z, transposed, stride=1, padding=3)
    model.architecture = Architecture(channels=32, channel_mult=(1,), num_res_blocks=1, z_channels=4)
    z = torch.randn(1, 4, 24, 24)
    whole, tiled = model.decode(z), TiledAutoencoder(model, 16).decode(z)
    inside = torch.zeros(24, dtype=torch.bool)
    inside[0:5] = inside[11:13] = inside[19:] = True  # tiles of 16 start at 0 and 8: 3 cells from their inner borders
    torch.testing.assert_close(tiled[:, :, inside][..., inside], whole[:, :, inside][..., inside])
    assert not torch.allclose(tiled, whole)


@pytest.mark.parametrize("size", [(8, 8), (8, 26), (30, 18)])
def test_decoded_tiles_are_finite_and_near_the_whole(kl, size):
    z = torch.randn(1, 4, *size)
    whole, tiled = kl.decode(z), TiledAutoencoder(kl, 12).decode(z)
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    assert (tiled - whole).square().mean() < 0.2 * whole.var()


def test_memory_is_bounded_by_the_tile(kl, network):
    """No network sees more than one tile of one batch, however large the picture is."""
    seen = []
    parts = (kl.encoder, kl.decoder, network.diffusion_model)
    hooks = [part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:])) for part in parts]
    tiles = TiledAutoencoder(kl, 8)
    tiles.decode(tiles.encode_mode(torch.randn(1, 3, 32, 64)))
    TiledNetwork(network, 8)(torch.randn(1, 4, 16, 32), torch.tensor([1]), Conditioning(context=torch.randn(1, 1, 8)))
    for hook in hooks:
        hook.remove()
    assert set(seen) == {(16, 16), (8, 8)} and len(seen) == 3 * 21


def test_codes_are_chosen_before_the_cut():
    vq = autoencoder(VectorQuantizer(8, 4))
    nn.init.normal_(vq.quantize.embedding.weight)
    z, tiles = torch.randn(1, 4, 8, 20), TiledAutoencoder(vq, 8)
    torch.testing.assert_close(tiles.decode(z), tiles.decode(vq.quantize.nearest_codes(z), quantize=False))


def test_a_tiled_first_stage_has_no_weights_of_its_own(kl):
    tiles = TiledAutoencoder(kl, 8)
    assert not tiles.state_dict() and tiles.latent_shape(16, 24) == (4, 8, 12)
    conditioner = FirstStageConditioner(mask_key="mask")
    conditioner.use_first_stage(kl)
    names = set(conditioner.state_dict())
    batch = {"masked_image": torch.randn(1, 3, 32, 16), "mask": torch.ones(1, 1, 32, 16)}
    conditioner.use_first_stage(tiles)
    assert set(conditioner.state_dict()) == names
    torch.testing.assert_close(conditioner(batch).concat[:, :4], tiles.encode_mode(batch["masked_image"]))


def test_networks_cut_what_is_concatenated_and_share_the_rest(network):
    x, t = torch.randn(2, 2, 16, 24), torch.tensor([3, 5])
    conditioning = Conditioning(concat=torch.randn(2, 2, 16, 24), context=torch.randn(2, 3, 8))
    whole = network(x, t, conditioning)
    torch.testing.assert_close(TiledNetwork(network, 24)(x, t, conditioning), whole)
    tiles = TiledNetwork(network, 16)(x, t, conditioning)
    assert torch.isfinite(tiles).all() and (tiles - whole).square().mean() < 0.5 * whole.var()
    small = Conditioning(concat=torch.zeros(2, 2, 1, 1), context=conditioning.context)
    zeros = Conditioning(concat=torch.zeros(2, 2, 16, 24), context=conditioning.context)
    torch.testing.assert_close(TiledNetwork(network, 8)(x, t, small), TiledNetwork(network, 8)(x, t, zeros))


def test_a_picture_of_another_size_is_told(network):
    conditioning = Conditioning(concat=torch.zeros(1, 2, 8, 8))
    with pytest.raises(UserError, match="8 x 8, the latent 16 x 16"):
        TiledNetwork(network, 8)(torch.randn(1, 2, 16, 16), torch.tensor([1]), conditioning)


def test_every_tile_may_have_a_context_of_its_own(network):
    torch.manual_seed(0)
    conditioner = ClassConditioner(4, 8, null_label=3)
    labels, x, t = torch.tensor([[0, 0, 0], [0, 1, 2]]), torch.randn(1, 2, 8, 16).expand(2, -1, -1, -1), torch.ones(2)
    tiled = TiledConditioner(conditioner, 3)
    contexts = tiled({"class_label": labels})
    assert contexts.context.shape == (2, 3, 8) and tiled.unconditional(2).context.shape == (2, 3, 8)
    with_concat = Conditioning(torch.zeros(2, 2, 1, 1), contexts.context)
    y = TiledNetwork(network, 8, contexts_differ=True)(x, t, with_concat)
    same = TiledNetwork(network, 8)(x, t, Conditioning(torch.zeros(2, 2, 1, 1), contexts.context[:, :1]))
    torch.testing.assert_close(y[0], same[0])
    difference = (y - same)[1].abs().amax((0, 1))
    assert difference[:4].max() < 1e-5 < difference[8:].min()


def test_a_tiled_model_shares_weights_and_leaves_the_model_as_it_is():
    conditioner = FirstStageConditioner(mask_key="mask")
    model = tiny.latent_diffusion(tiny.unet(2, 3), tiny.autoencoder(), conditioner).model.eval()
    before, tiled = dict(model.named_modules()), tile(model, 8)
    assert dict(model.named_modules()) == before and isinstance(tiled.first_stage_model, TiledAutoencoder)
    ours, its = ({p.data_ptr() for p in each.parameters()} for each in (model, tiled))
    assert its and its <= ours
    conditions = {"masked_image": torch.rand(1, 3, 8, 24), "mask": torch.ones(1, 1, 8, 24)}
    whole, tiles = (each.sample(conditions, steps=2, size=(8, 24)) for each in (model, tiled))
    assert whole.shape == tiles.shape and not torch.equal(whole, tiles)
    same = tile(model, 24).sample(conditions, steps=2, size=(8, 24))  # one tile is the whole
    torch.testing.assert_close(same, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [0, 3])
def test_sides_that_a_model_cannot_have(side):
    with pytest.raises(UserError, match=f"tile {side}: .* multiple of 2 pixels"):
        tile(tiny.class_diffusion().model, side)


def test_places_of_tiles_and_one_condition_for_each():
    model = tiny.class_diffusion().model.eval()  # latents are half as large
    boxes = tile_boxes(model, 16, (16, 32))
    assert boxes == [(0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0)]
    tiled = tile(model, 16, contexts_for=(16, 32))
    labels = torch.tensor([[0, 0, 0], [0, 1, 2]])
    images = tiled.sample({"class_label": labels}, steps=2, guidance=2.0, size=(16, 32))
    plain = tile(model, 16).sample([0], steps=2, guidance=2.0, size=(16, 32))
    torch.testing.assert_close(images[:1], plain, atol=1e-4, rtol=1e-4)
