"""Rescaled, encoded and plain pictures."""

import pytest
import torch
import torch.nn.functional as F

from ldm.autoencoder.regularizers import KL
from ldm.conditioning.images import RESCALE_METHODS, FirstStageConditioner, ImageConditioner, SpatialRescaler
from ldm.errors import UserError
from ldm.models.autoencoder import Autoencoder
from ldm.networks.encoder_decoder import Architecture


@pytest.fixture
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    architecture = Architecture(channels=32, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, resolution=16)
    return Autoencoder(architecture, KL(), embed_dim=4).eval().requires_grad_(False)


@pytest.mark.parametrize("method", sorted(set(RESCALE_METHODS) - {"linear", "trilinear"}))
def test_rescaler_halves_each_stage(method):
    x = torch.randn(1, 3, 16, 24)
    result = SpatialRescaler("x", 2, method)({"x": x}).concat
    expected = F.interpolate(F.interpolate(x, scale_factor=0.5, mode=method), scale_factor=0.5, mode=method)
    torch.testing.assert_close(result, expected)


def test_rescaler_maps_channels_last():
    rescaler = SpatialRescaler("x", 1, in_channels=5, out_channels=2, bias=True)
    assert [name for name, _ in rescaler.named_parameters()] == ["channel_mapper.weight", "channel_mapper.bias"]
    assert rescaler({"x": torch.randn(1, 5, 8, 8)}).concat.shape == (1, 2, 4, 4)
    assert not SpatialRescaler("x").state_dict()


@pytest.mark.parametrize("make", [lambda: SpatialRescaler("x", 1, in_channels=4), lambda: ImageConditioner("x", 4)])
def test_index_maps_become_planes(make):
    indices = torch.randint(-1, 4, (2, 8, 8))  # -1: no class
    planes = torch.stack([(indices == k).float() for k in range(4)], dim=1)
    conditioner = make()
    torch.testing.assert_close(conditioner({"x": indices}).concat, conditioner({"x": planes}).concat)
    with pytest.raises(UserError, match="class 4.* 0 to 3"):
        conditioner({"x": torch.full((1, 8, 8), 4)})


def test_rescaler_refuses_unknown_methods_and_negative_stages():
    with pytest.raises(UserError, match="'cubic' .*nearest"):
        SpatialRescaler("x", method="cubic")
    with pytest.raises(UserError, match="num_stages is -1"):
        SpatialRescaler("x", -1)


def test_first_stage_conditions_by_the_mode_and_the_shrunk_mask(autoencoder):
    conditioner = FirstStageConditioner("masked", "mask")
    conditioner.use_first_stage(autoencoder)
    picture, mask = torch.randn(2, 3, 16, 16), torch.randn(2, 1, 16, 16).sign()
    result = conditioner({"masked": picture, "mask": mask}).concat
    torch.testing.assert_close(result[:, :4], autoencoder.encode_mode(picture))
    torch.testing.assert_close(result[:, 4:], mask[:, :, ::2, ::2])


def test_first_stage_appears_under_its_own_names_and_shares_its_weights(autoencoder):
    conditioner = FirstStageConditioner("masked")
    conditioner.use_first_stage(autoencoder)
    assert list(conditioner.state_dict()) == list(autoencoder.state_dict())
    both = dict(autoencoder.named_parameters())
    assert all(parameter is both[name] for name, parameter in conditioner.named_parameters())


def test_first_stage_is_required():
    with pytest.raises(UserError, match="no autoencoder yet"):
        FirstStageConditioner("masked")({"masked": torch.randn(1, 3, 16, 16)})
