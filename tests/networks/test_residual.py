"""Residual blocks and changes of resolution: closed forms, initial values, dimensions."""

import pytest
import torch
import torch.nn.functional as F

from ldm.networks.residual import Downsample, ResBlock, Upsample


def test_embedding_is_added_between_the_convolutions(randomised):
    block = randomised(ResBlock(32, 8, out_channels=64))
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    h = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
    torch.testing.assert_close(block(x, emb), block.skip_connection(x) + block.out_layers(h))


def test_scale_shift_modulates_the_second_normalisation(randomised):
    block = randomised(ResBlock(32, 8, use_scale_shift_norm=True))
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    scale, shift = block.emb_layers(emb)[:, :, None, None].split(32, dim=1)
    h = block.out_layers[0](block.in_layers(x)) * (1 + scale) + shift
    torch.testing.assert_close(block(x, emb), x + block.out_layers[1:](h))


@pytest.mark.parametrize("up", [True, False])
def test_resampling_happens_before_the_first_convolution_and_on_the_skip(randomised, up):
    block = randomised(ResBlock(32, 8, up=up, down=not up))
    resample = (lambda x: F.interpolate(x, scale_factor=2)) if up else (lambda x: F.avg_pool2d(x, 2))
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    h = block.in_layers[2](resample(F.silu(block.in_layers[0](x)))) + block.emb_layers(emb)[:, :, None, None]
    torch.testing.assert_close(block(x, emb), resample(x) + block.out_layers(h))


@pytest.mark.parametrize(("use_conv", "kernel_size"), [(False, 1), (True, 3)])
def test_block_begins_as_its_skip_connection(use_conv, kernel_size):
    block = ResBlock(32, 8, out_channels=64, use_conv=use_conv)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    assert block.skip_connection.kernel_size == (kernel_size, kernel_size)
    torch.testing.assert_close(block(x, emb), block.skip_connection(x))
    plain = ResBlock(32, 8)
    assert torch.equal(plain(x, emb), x)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_memory_format_is_kept(randomised, scale_shift):
    block, x = randomised(ResBlock(32, 8, use_scale_shift_norm=scale_shift)), torch.randn(2, 32, 4, 6)
    emb = torch.randn(2, 8)
    y = block.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), emb)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, block(x, emb), atol=1e-5, rtol=1e-5)


def test_checkpointing_with_dropout_changes_no_gradient(randomised):
    gradients = []
    for checkpoint in (False, True):
        block = randomised(ResBlock(32, 8, dropout=0.5, checkpoint=checkpoint)).train()
        torch.manual_seed(1)
        x, emb = torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 8)
        block(x, emb).square().sum().backward()
        gradients.append([x.grad] + [parameter.grad for parameter in block.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("use_conv", [False, True])
@pytest.mark.parametrize(("dims", "small", "large"), [(1, (4,), (8,)), (2, (4, 3), (8, 6)), (3, (5, 4, 3), (5, 8, 6))])
def test_resolution_changes_by_two_but_never_along_the_first_axis_of_three(dims, small, large, use_conv):
    assert Upsample(4, use_conv, dims)(torch.randn(1, 4, *small)).shape == (1, 4, *large)
    assert Downsample(4, use_conv, dims)(torch.randn(1, 4, *large)).shape == (1, 4, *small)


def test_upsampling_repeats_and_downsampling_averages():
    x = torch.randn(1, 4, 3, 3)
    up = Upsample(4, use_conv=False)(x)
    torch.testing.assert_close(up[:, :, ::2, 1::2], x)
    torch.testing.assert_close(Downsample(4, use_conv=False)(up), x)


def test_strided_convolution_pads_all_sides_alike():
    layer, x = Downsample(4, out_channels=6), torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.op.weight, layer.op.bias, stride=2, padding=1))
    assert layer(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)
