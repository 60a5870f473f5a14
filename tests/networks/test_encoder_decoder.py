"""The first stage's encoder and decoder: published sizes, places of attention, padding, precision, and errors."""

import pytest
import torch
import torch.nn.functional as F

from ldm.errors import UserError
from ldm.networks.encoder_decoder import (
    Architecture,
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    LinAttnBlock,
    ResnetBlock,
    Upsample,
)

TINY = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "resolution": 16}


@pytest.mark.parametrize(
    ("config", "double_z", "encoder", "decoder"),
    [
        ({"z_channels": 3}, True, 22_351_238, 32_960_771),
        ({"z_channels": 3}, False, 22_337_411, 32_960_771),
        ({"z_channels": 3, "attention": "none"}, False, 21_285_763, 31_909_123),
        ({"z_channels": 4, "channel_mult": (1, 2, 4, 4)}, True, 34_163_592, 49_490_179),
        (
            {"z_channels": 4, "channel_mult": (1, 2, 2, 4), "attention_resolutions": (32,)},
            False,
            27_397_764,
            40_253_955,
        ),
        (
            {"z_channels": 64, "channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 8)},
            True,
            42_614_656,
            61_244_803,
        ),
    ],
)
def test_published_sizes(config, double_z, encoder, decoder):
    with torch.device("meta"):
        models = Encoder(Architecture(**config), double_z), Decoder(Architecture(**config))
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == (encoder, decoder)


@pytest.mark.parametrize("mult", [(1,), (1, 2), (1, 1, 2)])
def test_sides_change_by_the_factor(mult):
    arch = Architecture(**TINY | {"channel_mult": mult})
    h = Encoder(arch)(torch.randn(2, 3, 16, 24))
    assert arch.factor == 2 ** (len(mult) - 1)
    assert h.shape == (2, 8, 16 // arch.factor, 24 // arch.factor)
    assert Decoder(arch)(h[:, :4]).shape == (2, 3, 16, 24)


def test_double_z_doubles_only_the_last_convolution():
    arch = Architecture(**TINY)
    with torch.device("meta"):
        shapes = [{k: v.shape for k, v in Encoder(arch, double_z).state_dict().items()} for double_z in (True, False)]
    assert {k for k in shapes[0] if shapes[0][k] != shapes[1][k]} == {"conv_out.weight", "conv_out.bias"}


@pytest.mark.parametrize(("resolutions", "levels"), [((), []), ((16,), ["0"]), ((8,), ["1"]), ((16, 8), ["0", "1"])])
def test_attention_sits_at_nominal_resolutions(resolutions, levels):
    arch = Architecture(**TINY, attention_resolutions=resolutions)
    with torch.device("meta"):
        for model, root in ((Encoder(arch), "down"), (Decoder(arch), "up")):
            names = model.state_dict()
            assert sorted({k.split(".")[1] for k in names if k.startswith(root) and ".attn." in k}) == levels
            assert "mid.attn_1.q.weight" in names


def test_without_attention_there_is_none_even_in_the_middle():
    with torch.device("meta"):
        names = Encoder(Architecture(**TINY, attention="none", attention_resolutions=(16,))).state_dict()
    assert not any("attn" in name for name in names)


def test_decoder_levels_are_listed_from_the_highest_resolution():
    with torch.device("meta"):
        names = Decoder(Architecture(**TINY)).state_dict()
    assert "up.1.upsample.conv.weight" in names and "up.0.upsample.conv.weight" not in names
    assert names["up.0.block.1.conv1.weight"].shape[0] == 32 and names["up.1.block.1.conv1.weight"].shape[0] == 64


def test_downsampling_pads_right_and_below_only():
    layer, x = Downsample(1), torch.arange(1.0, 17).view(1, 1, 4, 4)
    with torch.no_grad():
        layer.conv.bias.zero_()
        layer.conv.weight.zero_()[..., 0, 0] = 1.0  # picks the window's upper left corner
        assert torch.equal(layer(x), x[..., ::2, ::2])
        layer.conv.weight.zero_()[..., 2, 2] = 1.0  # the lower right one: beyond the edge it is zero
        assert torch.equal(layer(x), F.pad(x[..., 2:, 2:], (0, 1, 0, 1))[..., ::2, ::2])


def test_resampling_without_convolution_has_no_parameters():
    x = torch.randn(1, 2, 4, 4)
    assert not list(Downsample(2, with_conv=False).parameters()) + list(Upsample(2, with_conv=False).parameters())
    assert torch.allclose(Downsample(2, with_conv=False)(Upsample(2, with_conv=False)(x)), x)


def test_attention_block_is_softmax_attention_with_one_head(randomised):
    block, x = randomised(AttnBlock(32)), torch.randn(2, 32, 3, 5)
    q, k, v = (layer(block.norm(x)).flatten(2) for layer in (block.q, block.k, block.v))  # (B, C, N)
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 32**0.5, dim=-1)
    expected = x + block.proj_out(torch.einsum("bnm,bcm->bcn", weights, v).view_as(x))
    torch.testing.assert_close(block(x), expected)


def test_linear_attention_block_has_no_residual(randomised):
    block = randomised(LinAttnBlock(8))
    with torch.no_grad():
        block.to_out.weight.zero_()
        block.to_out.bias.zero_()
        assert not block(torch.randn(1, 8, 4, 4)).any()


@pytest.mark.parametrize(("conv_shortcut", "name", "size"), [(False, "nin_shortcut", 1), (True, "conv_shortcut", 3)])
def test_residual_block_changes_width_on_the_skip(conv_shortcut, name, size):
    block = ResnetBlock(32, 64, conv_shortcut=conv_shortcut)
    assert block.state_dict()[f"{name}.weight"].shape == (64, 32, size, size)
    assert block(torch.randn(1, 32, 4, 4)).shape == (1, 64, 4, 4)
    assert not any("shortcut" in key for key in ResnetBlock(32, conv_shortcut=conv_shortcut).state_dict())


def test_dropout_acts_in_training_only():
    block, x = ResnetBlock(32, dropout=0.5), torch.randn(1, 32, 4, 4)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_decoder_ends(randomised):
    arch, z = Architecture(**TINY), torch.randn(1, 4, 4, 4)
    plain, early, bounded = (randomised(Decoder(arch, **o)) for o in ({}, {"give_pre_end": True}, {"tanh_out": True}))
    assert early(z).shape == (1, 32, 8, 8)
    torch.testing.assert_close(plain.conv_out(F.silu(plain.norm_out(early(z)))), plain(z))
    torch.testing.assert_close(bounded(z), plain(z).tanh())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_and_memory_formats_stay_close_to_float32(randomised, memory_format):
    encoder, x = randomised(Encoder(Architecture(**TINY))), torch.randn(1, 3, 16, 16)
    expected = encoder(x)
    encoder.to(memory_format=memory_format)
    torch.testing.assert_close(encoder(x.to(memory_format=memory_format)), expected, rtol=1e-4, atol=1e-4)
    half = encoder.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 48}, "48 channels"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"attention": "full"}, "vanilla, linear, none"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Architecture(**TINY | change)


def test_lists_from_yaml_become_tuples():
    assert Architecture(**TINY | {"channel_mult": [1, 2]}) == Architecture(**TINY)


def test_without_norms_brightness_passes_through():
    arch = Architecture(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=2, resolution=16, norm_groups=None
    )
    encoder = Encoder(arch)
    assert not any("norm" in name for name, _ in encoder.named_parameters())
    dark, bright = (encoder(torch.full((1, 3, 16, 16), value)).mean((2, 3)) for value in (-0.5, 0.5))
    assert (dark - bright).abs().max() > 1e-3
    with pytest.raises(UserError, match="norm_groups, 3"):
        Architecture(channels=8, norm_groups=3)
