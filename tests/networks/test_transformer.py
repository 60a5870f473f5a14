"""The text encoder: published names and sizes, initial values, and what it depends on."""

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.transformer import TransformerEncoder


def test_published_encoder_has_its_published_size():
    with torch.device("meta"):
        encoder = TransformerEncoder(30522, 77, 1280, 32)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 581994042
    assert encoder.attn_layers.layers[0][1].to_q.weight.shape == (512, 1280)


def test_state_dict_names_are_the_published_ones():
    names = set(TransformerEncoder(20, 6, 16, 1).state_dict())
    assert names == {
        "token_emb.weight",
        "pos_emb.emb.weight",
        *(f"attn_layers.layers.{i}.0.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
        *(f"attn_layers.layers.0.1.to_{name}.weight" for name in ("q", "k", "v", "out")),
        "attn_layers.layers.0.1.to_out.bias",
        *(f"attn_layers.layers.1.1.net.{i}.{kind}" for i in ("0.0", "2") for kind in ("weight", "bias")),
        *(f"{name}.{kind}" for name in ("norm", "to_logits") for kind in ("weight", "bias")),
    }


def test_embeddings_begin_with_the_published_spread_unless_told_otherwise():
    for spread, options in ((0.02, {}), (1.0, {"embedding_std": 1.0})):
        encoder = TransformerEncoder(500, 77, 64, 1, **options)
        for embedding in (encoder.token_emb.weight, encoder.pos_emb.emb.weight):
            assert abs(embedding.std().item() / spread - 1) < 0.1


def test_without_layers_it_normalises_the_sum_of_the_embeddings(randomised):
    encoder = randomised(TransformerEncoder(20, 6, 16, 0))
    ids = torch.tensor([[3, 1, 4]])
    expected = encoder.norm(encoder.token_emb.weight[ids] + encoder.pos_emb.emb.weight[:3])
    torch.testing.assert_close(encoder(ids), expected)


def test_every_token_sees_all_tokens_and_their_order(randomised):
    encoder = randomised(TransformerEncoder(20, 6, 16, 2, num_heads=2, head_channels=4))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    out = encoder(ids)
    assert out.shape == (1, 5, 16)
    later = encoder(torch.tensor([[3, 1, 4, 1, 9]]))
    assert (later[:, 0] - out[:, 0]).abs().max() > 1e-4
    assert (encoder(ids.flip(1)).flip(1) - out).abs().max() > 1e-4


def test_dropout_of_the_embeddings_acts_in_training_only():
    encoder = TransformerEncoder(20, 6, 16, 0, embedding_dropout=1.0)
    ids = torch.tensor([[3, 1, 4]])
    assert not encoder(ids).any()
    assert encoder.eval()(ids).any()


def test_too_many_tokens_are_a_user_error():
    with pytest.raises(UserError, match="max_length=6"):
        TransformerEncoder(20, 6, 16, 1)(torch.zeros(1, 7, dtype=torch.long))
