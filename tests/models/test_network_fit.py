"""At the start of a run: what the conditioners give against what the network takes."""

import pytest
import tiny
import torch
from torch import nn

from ldm.conditioning.base import JointConditioner, StackedConditioner
from ldm.conditioning.images import FirstStageConditioner, ImageConditioner, SpatialRescaler
from ldm.conditioning.labels import ClassConditioner
from ldm.conditioning.sizes import SizeConditioner
from ldm.conditioning.text import EmbeddingConditioner
from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.conditional_network import check_fit


def unet(in_channels=4, out_channels=4, **options):
    with torch.device("meta"):
        return tiny.unet(out_channels, in_channels - out_channels, **options)


def stacked(one, other, size):
    parts = {"a": EmbeddingConditioner("a", one), "b": EmbeddingConditioner("b", other)}
    return StackedConditioner(**parts, size=SizeConditioner(dim=size))


def inpainting(**options):
    conditioner = FirstStageConditioner(**options)
    conditioner.use_first_stage(IdentityAutoencoder(4))
    return conditioner


@pytest.mark.parametrize(
    ("network", "conditioner"),
    [
        (unet(), None),
        (unet(9), inpainting(mask_key="mask")),
        (unet(8), inpainting()),
        (unet(7), SpatialRescaler(in_channels=182, out_channels=3)),
        (unet(context_dim=16), ClassConditioner(5, 16)),
        (unet(num_classes=5), ClassConditioner(5, slot="vector")),
        (nn.Identity(), ImageConditioner("low_res")),  # the placeholder of a model without a network
        (unet(7, context_dim=16), JointConditioner(a=ImageConditioner("low_res"), b=EmbeddingConditioner("e", 16))),
        (unet(context_dim=24, vector_dim=12), stacked(16, 8, 6)),
    ],
)
def test_what_fits_is_accepted(network, conditioner):
    check_fit(network, 4, conditioner)


@pytest.mark.parametrize(
    ("network", "conditioner", "message"),
    [
        (unet(4, 3), None, "UNet: out_channels is 3, but .* 4 channels; set out_channels: 4"),
        (unet(7), None, "in_channels is 7, but .* 4 channels, and no conditioner concatenates any; set in_channels: 4"),
        (unet(8), inpainting(mask_key="mask"), "in_channels is 8.*FirstStageConditioner concatenates 5; .*: 9"),
        (unet(4), ImageConditioner("low_res"), "in_channels is 4.*ImageConditioner concatenates 3; .*: 7"),
        (unet(), ClassConditioner(5, 16), "UNet: context_dim is None, but ClassConditioner fills slot context"),
        (unet(context_dim=8), ClassConditioner(5, 16), "context_dim is 8, but ClassConditioner .* width 16"),
        (unet(context_dim=8), None, "context_dim is 8, but no conditioner fills slot context"),
        (unet(num_classes=4), ClassConditioner(5, slot="vector"), "num_classes is 4, but ClassConditioner .* width 5"),
        (unet(), ClassConditioner(5, slot="vector"), "num_classes is None, but ClassConditioner fills slot vector"),
        (unet(context_dim=16, vector_dim=12), stacked(16, 8, 6), "context_dim is 16, .*16 [+] 8 channels; set .*: 24"),
        (unet(context_dim=24, vector_dim=9), stacked(16, 8, 6), "vector_dim is 9, .*12 channels; set vector_dim: 12"),
    ],
)
def test_what_does_not_fit_is_named_on_both_sides(network, conditioner, message):
    with pytest.raises(UserError, match=message) as caught:
        check_fit(network, 4, conditioner)
    assert "\n" not in str(caught.value)


def test_a_network_that_is_no_backbone_is_refused_with_what_it_lacks():
    with pytest.raises(UserError, match="Conv2d: .* lacks context_dim, num_classes, size_multiple, blocks"):
        check_fit(nn.Conv2d(4, 4, 1), 4)


def test_a_model_does_not_start_so():
    with pytest.raises(UserError, match="in_channels is 4.*ImageConditioner .*3"):
        tiny.latent_diffusion(unet(), IdentityAutoencoder(4), ImageConditioner("low_res"))
