"""Closed forms and dtype, memory format contracts of the shared layers."""

import pytest
import torch
from einops import rearrange

from ldm.errors import UserError
from ldm.networks.layers import GroupNorm32, LayerNorm32, RMSNorm32, average_pool, conv, recompute, zeroed


def test_group_norm_has_the_closed_form(randomised):
    norm = randomised(GroupNorm32(64, eps=1e-3))
    x = torch.randn(2, 64, 3, 5)
    groups = rearrange(x, "b (g c) h w -> b g (c h w)", g=32)
    var, mean = torch.var_mean(groups, dim=-1, keepdim=True, unbiased=False)
    expected = ((groups - mean) / (var + 1e-3).sqrt()).reshape(x.shape)
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_group_norm_keeps_dtype_and_memory_format(dtype, memory_format):
    norm = GroupNorm32(32)
    x = (3 + torch.randn(2, 32, 8, 8)).to(dtype).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.float(), norm(x.float()), atol=0.03, rtol=0.03)


def test_the_single_value_of_a_group_is_normalised_to_the_bias(randomised):
    norm = randomised(GroupNorm32(32))
    torch.testing.assert_close(norm(torch.randn(1, 32, 1, 1)).flatten(), norm.bias, atol=1e-4, rtol=0)


def test_half_inputs_are_normalised_with_float32_statistics():
    x = torch.full((1, 32, 64, 64), 300.0, dtype=torch.float16)  # the sum of squares overflows half precision
    x[..., ::2] = -300.0
    torch.testing.assert_close(GroupNorm32(32)(x).float(), x.float() / 300, atol=1e-3, rtol=0)


@pytest.mark.parametrize("make", [LayerNorm32, RMSNorm32])
def test_norms_of_tokens_keep_the_dtype(make, randomised, recwarn):
    norm = randomised(make(16))
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16 and norm(x).dtype == torch.float32
    assert norm(x.bfloat16()).dtype == torch.bfloat16 and not recwarn.list
    torch.testing.assert_close(norm(x.bfloat16()).float(), norm(x), atol=0.03, rtol=0.03)


def test_channels_that_do_not_form_32_groups_are_a_user_error():
    with pytest.raises(UserError, match="48 channels"):
        GroupNorm32(48)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_and_pools_by_dimension(dims):
    x = torch.randn(1, 2, *(4,) * dims)
    assert conv(dims, 2, 5, 3, padding=1)(x).shape == (1, 5, *(4,) * dims)
    torch.testing.assert_close(average_pool(dims, 4)(x).flatten(1), x.flatten(2).mean(-1))


def test_zeroed_clears_weights_and_biases():
    assert not any(parameter.any() for parameter in zeroed(conv(2, 3, 4, 1)).parameters())


@pytest.mark.parametrize("enabled", [False, True])
def test_recompute_runs_twice_only_when_gradients_are_wanted(enabled):
    calls = []

    def square(x):
        calls.append(x)
        return x * x

    x = torch.tensor(3.0, requires_grad=True)
    recompute(enabled, square, x).backward()
    assert x.grad == 6
    assert len(calls) == 1 + enabled
    with torch.no_grad():
        recompute(enabled, square, x)
    assert len(calls) == 2 + enabled
