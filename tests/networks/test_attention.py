"""Attention against explicit softmax, its symmetries, memory formats and initial values."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from ldm.errors import UserError
from ldm.networks.attention import (
    AttentionBlock,
    AttentionPool2d,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    SpatialSelfAttention,
    SpatialTransformer,
    attend,
    by_products,
    head_split,
)


def explicit(q, k, v):
    """softmax(q k^T / sqrt(d)) v for one head: (N, d), (M, d), (M, d) -> (N, d)."""
    return ((q @ k.T) / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_cross_attention_is_softmax_attention_of_every_head(randomised):
    layer = randomised(CrossAttention(6, 5, num_heads=2, head_channels=4))
    x, context = torch.randn(1, 3, 6), torch.randn(1, 7, 5)
    q, k, v = layer.to_q(x)[0], layer.to_k(context)[0], layer.to_v(context)[0]
    heads = [explicit(q[:, s], k[:, s], v[:, s]) for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(layer(x, context)[0], layer.to_out(torch.cat(heads, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_of_context_is_its_value_whatever_the_queries(randomised, dtype):
    layer = randomised(CrossAttention(6, 5, num_heads=2, head_channels=4)).to(dtype)
    x, context = torch.randn(2, 3, 6, dtype=dtype), torch.randn(2, 1, 5, dtype=dtype, requires_grad=True)
    out = layer(x, context)
    assert torch.equal(out, layer.to_out(layer.to_v(context)).expand(-1, 3, -1))
    twice = layer(x, context.repeat(1, 2, 1))  # two equal tokens, by the general way
    torch.testing.assert_close(out, twice)
    out.float().square().sum().backward()
    assert not layer.to_q.weight.grad.any() and not layer.to_k.weight.grad.any()
    assert layer.to_v.weight.grad.any() and context.grad.any()


def test_products_are_the_fused_kernels_attention():
    q, k, v = (torch.randn(2, 1, 7, 320, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.testing.assert_close(by_products(q, k, v).double(), attend(q, k, v), rtol=1e-6, atol=1e-6)


def test_mask_removes_tokens(randomised):
    layer = randomised(CrossAttention(8, 5, num_heads=2, head_channels=4))
    x, context = torch.randn(2, 3, 8), torch.randn(2, 6, 5)
    mask = torch.tensor([[True, True, False, True, False, False]]).expand(2, -1)
    torch.testing.assert_close(layer(x, context, mask), layer(x, context[:, [0, 1, 3]]))
    torch.testing.assert_close(layer(x, context, mask.reshape(2, 2, 3)), layer(x, context, mask))


def test_fully_masked_row_attends_to_everything_alike(randomised):
    layer = randomised(CrossAttention(8, 5, num_heads=2, head_channels=4))
    x, context = torch.randn(1, 3, 8), torch.randn(1, 6, 5)
    out = layer(x, context, torch.zeros(1, 6, dtype=torch.bool))
    expected = layer.to_out(layer.to_v(context).mean(dim=1, keepdim=True)).expand(-1, 3, -1)
    torch.testing.assert_close(out, expected)


def test_attention_is_equivariant_to_tokens_and_invariant_to_the_order_of_the_context(randomised):
    block = randomised(BasicTransformerBlock(16, 2, 8, context_dim=5))
    x, context, order = torch.randn(2, 6, 16), torch.randn(2, 4, 5), torch.randperm(6)
    torch.testing.assert_close(block(x[:, order], context), block(x, context)[:, order])
    torch.testing.assert_close(block(x, context.flip(1)), block(x, context))


def test_block_without_context_attends_to_itself(randomised):
    block = randomised(BasicTransformerBlock(16, 2, 8))
    x = torch.randn(2, 6, 16)
    y = x + block.attn1(block.norm1(x))
    y = y + block.attn2(block.norm2(y))
    torch.testing.assert_close(block(x), y + block.ff(block.norm3(y)))


def test_gated_feed_forward_takes_the_value_first_and_the_exact_gelu(randomised):
    layer = randomised(FeedForward(6, dim_out=5, mult=3, glu=True))
    x = torch.randn(4, 6)
    value, gate = layer.net[0].proj(x).split(18, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(layer(x), F.linear(value * gelu, layer.net[2].weight, layer.net[2].bias))
    assert FeedForward(6)(x).shape == (4, 6)


@pytest.mark.parametrize("shape", [(2, 64, 10), (2, 64, 3, 5), (2, 64, 2, 3, 4)])
@pytest.mark.parametrize("order", ["legacy", "new"])
def test_attention_block_reads_its_channels_in_either_order(randomised, order, shape):
    block = randomised(AttentionBlock(64, num_heads=4, qkv_order=order))
    x = torch.randn(shape)
    qkv = block.qkv(block.norm(x).flatten(2))[0]  # (3C, N)
    pattern = "(h three d) n -> three h n d" if order == "legacy" else "(three h d) n -> three h n d"
    q, k, v = rearrange(qkv, pattern, three=3, h=4)
    heads = torch.cat([explicit(*head) for head in zip(q, k, v, strict=True)], dim=-1)
    added = block.proj_out(heads.T[None]).reshape(x[0].shape)
    torch.testing.assert_close(block(x)[0], x[0] + added, atol=1e-5, rtol=1e-5)


def test_number_of_heads_may_be_given_by_their_width(randomised):
    x = torch.randn(1, 64, 4, 4)
    by_width = randomised(AttentionBlock(64, num_head_channels=16))
    torch.testing.assert_close(by_width(x), randomised(AttentionBlock(64, num_heads=4))(x))
    assert head_split(96, None, 32) == (3, 32)
    assert head_split(96, 8, None) == (8, 12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttentionBlock(64, num_heads=3),
        lambda: AttentionBlock(64, num_head_channels=24),
        lambda: AttentionBlock(64, num_head_channels=128),
        lambda: AttentionBlock(64, qkv_order="old"),
        lambda: head_split(64, None, None),
        lambda: head_split(64, 3, None),
        lambda: head_split(64, 8, 30),
    ],
)
def test_impossible_heads_are_user_errors(make):
    with pytest.raises(UserError):
        make()


def test_linear_attention_normalises_keys_over_positions(randomised):
    layer = randomised(LinearAttention(6, heads=2, head_channels=4))
    x = torch.randn(1, 6, 3, 5)
    q, k, v = rearrange(layer.to_qkv(x)[0], "(three h d) y x -> three h d (y x)", three=3, h=2)
    out = torch.stack([v[h] @ k[h].softmax(-1).T @ q[h] for h in range(2)])
    torch.testing.assert_close(layer(x), layer.to_out(rearrange(out, "h d (y x) -> 1 (h d) y x", y=3)))


def test_spatial_self_attention_has_one_head(randomised):
    layer = randomised(SpatialSelfAttention(32))
    x = torch.randn(1, 32, 3, 5)
    q, k, v = (f(layer.norm(x))[0].flatten(1).T for f in (layer.q, layer.k, layer.v))
    out = layer.proj_out(explicit(q, k, v).T.reshape(1, 32, 3, 5))
    torch.testing.assert_close(layer(x), x + out, atol=1e-5, rtol=1e-5)


def test_attention_pool_returns_the_row_of_the_mean(randomised):
    pool = randomised(AttentionPool2d(3, 8, num_head_channels=4, output_dim=5))
    x = torch.randn(2, 8, 3, 3)
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], -1) + pool.positional_embedding  # (B, C, 10)
    q, k, v = rearrange(pool.qkv_proj(tokens), "b (three h d) n -> three b h n d", three=3, h=2)
    out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b (h d) n")
    torch.testing.assert_close(pool(x), pool.c_proj(out)[:, :, 0])
    with pytest.raises(UserError, match="image_size"):
        pool(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("module", [AttentionBlock(32, num_heads=2), SpatialTransformer(32, 2, 16, depth=2)])
def test_residual_attention_begins_as_the_identity(module):
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(module(x), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttentionBlock(32, num_heads=2),
        lambda: SpatialTransformer(32, 2, 8, context_dim=16),
        lambda: LinearAttention(32),
        lambda: SpatialSelfAttention(32),
    ],
)
def test_memory_format_is_kept_and_changes_no_number(randomised, make):
    module, x = randomised(make()), torch.randn(2, 32, 4, 6)
    y = module.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, module(x), atol=1e-5, rtol=1e-5)


def test_checkpointing_with_dropout_changes_no_gradient(randomised):
    gradients = []
    for checkpoint in (False, True):
        module = randomised(SpatialTransformer(32, 2, 16, dropout=0.3, context_dim=5, checkpoint=checkpoint)).train()
        torch.manual_seed(1)
        x, context = torch.randn(2, 32, 4, 4, requires_grad=True), torch.randn(2, 3, 5)
        module(x, context).square().sum().backward()
        gradients.append([x.grad] + [parameter.grad for parameter in module.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_state_dict_names_are_the_published_ones():
    names = set(SpatialTransformer(32, 2, 16, context_dim=5).state_dict())
    assert {"norm.weight", "proj_in.weight", "proj_out.bias", "transformer_blocks.0.ff.net.0.proj.weight"} <= names
    assert {"transformer_blocks.0.attn2.to_out.0.bias", "transformer_blocks.0.norm3.weight"} <= names
    assert "transformer_blocks.0.attn1.to_q.bias" not in names
    shapes = {name: tuple(value.shape) for name, value in AttentionBlock(32).state_dict().items()}
    assert shapes["qkv.weight"] == (96, 32, 1)
    assert shapes["proj_out.weight"] == (32, 32, 1)
