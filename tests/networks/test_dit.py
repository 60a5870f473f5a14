"""The diffusion transformer: against diffusers' with the same weights, published sizes and names, positions."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import UserError
from ldm.networks.dit import DiT
from ldm.networks.dit_blocks import BlockOptions, rotary_angles, rotate, sincos_positions

# hidden_size, depth, num_heads, millions of parameters at patch 2 (table 1 of arXiv 2212.09748)
SIZES = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}
# billions of multiply-accumulates of one 256x256 image by patch size (table 4 of the paper)
GMACS = {"S": (6.06, 1.41, 0.36), "B": (23.01, 5.56, 1.42), "L": (80.71, 19.70, 5.01), "XL": (118.64, 29.05, 7.39)}
LIGHTNING = BlockOptions(rotary=True, gated=True, rms_norm=True)


def published(size: str, patch_size: int = 2, **options: object) -> DiT:
    """Return a DiT of ImageNet 256 of a published size, without memory."""
    hidden_size, depth, num_heads, _ = SIZES[size]
    given = {"in_channels": 4, "out_channels": 8, "input_size": 32, "num_classes": 1001} | options
    with torch.device("meta"):
        return DiT(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, **given)


def small(**options: object) -> DiT:
    """Return a small network none of whose layers is zero."""
    torch.manual_seed(0)
    given = {"in_channels": 4, "out_channels": 4, "input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    network = DiT(**given | options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_the_paper(size):
    count = sum(parameter.numel() for parameter in published(size).parameters())
    assert round(count / 1e6) == pytest.approx(SIZES[size][3], abs=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("column", "patch_size"), enumerate((2, 4, 8)))
def test_cost_is_that_of_the_paper(size, column, patch_size):
    network = published(size, patch_size)
    x, one = torch.empty(1, 4, 32, 32, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, one, y=one)
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[size][column], rel=0.01, abs=0.006)


def test_names_are_those_of_released_checkpoints():
    outside = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    linears = {
        "attn.qkv": (3456, 1152),
        "attn.proj": (1152, 1152),
        "mlp.fc1": (4608, 1152),
        "mlp.fc2": (1152, 4608),
        "adaLN_modulation.1": (6912, 1152),
    }
    expected = outside | {
        f"blocks.{i}.{name}.{kind}": shape if kind == "weight" else shape[:1]
        for i in range(28)
        for name, shape in linears.items()
        for kind in ("weight", "bias")
    }
    assert {name: tuple(value.shape) for name, value in published("XL").state_dict().items()} == expected
    sit = published("XL", out_channels=4, dropped_outputs=4)
    assert {name: tuple(value.shape) for name, value in sit.state_dict().items()} == expected


def test_names_of_lightning_dit():
    network = published("XL", 1, in_channels=32, out_channels=32, input_size=16, options=LIGHTNING)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["feat_rope.freqs_cos"] == shapes["feat_rope.freqs_sin"] == (256, 72)
    assert shapes["blocks.27.norm1.weight"] == shapes["final_layer.norm_final.weight"] == (1152,)
    assert shapes["blocks.0.mlp.w12.weight"] == (6144, 1152)
    assert shapes["blocks.0.mlp.w3.weight"] == (1152, 3072)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(675e6, rel=0.01)


@pytest.mark.parametrize("size", [(8, 8), (12, 16), (4, 8)])
def test_it_agrees_with_diffusers(size):
    transformers = pytest.importorskip("diffusers.models.transformers.dit_transformer_2d")
    torch.manual_seed(1)
    theirs = transformers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,  # as in the original; the default of diffusers is another one
    ).eval()
    for block in theirs.transformer_blocks:  # theirs end at 1 / 10000 exactly, the original's 127 / 128 of the way
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    ours = small(out_channels=8, num_classes=11)
    theirs.load_state_dict(_diffusers_names(ours.state_dict()), strict=False)
    x, t, y = torch.randn(3, 4, *size), torch.tensor([0, 421, 999]), torch.tensor([0, 7, 10])
    with torch.no_grad():
        expected = _diffusers_output(theirs, x, t, y)
        torch.testing.assert_close(ours(x, t, y=y), expected, atol=1e-6, rtol=1e-6)


def _diffusers_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of a DiT; diffusers has the embeddings of time and class once in each block."""
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for i in range(2):
        block, embedding = f"transformer_blocks.{i}", f"transformer_blocks.{i}.norm1.emb"
        renamed |= {
            f"{embedding}.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{embedding}.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{embedding}.class_embedder.embedding_table": "y_embedder.embedding_table",
            f"{block}.norm1.linear": f"blocks.{i}.adaLN_modulation.1",
            f"{block}.attn1.to_out.0": f"blocks.{i}.attn.proj",
            f"{block}.ff.net.0.proj": f"blocks.{i}.mlp.fc1",
            f"{block}.ff.net.2": f"blocks.{i}.mlp.fc2",
        }
    result = {}
    for theirs, ours in renamed.items():
        result |= {f"{theirs}.{k}": state[f"{ours}.{k}"] for k in ("weight", "bias") if f"{ours}.{k}" in state}
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            names = ("to_q", "to_k", "to_v")
            result |= {f"transformer_blocks.{i}.attn1.{n}.{kind}": p for n, p in zip(names, parts, strict=True)}
    return result


def _diffusers_output(network: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Run diffusers' parts on any size: its forward puts patches together for squares only."""
    tokens = network.pos_embed(x)
    for block in network.transformer_blocks:
        tokens = block(tokens, timestep=t, class_labels=y)
    c = network.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=tokens.dtype)
    shift, scale = network.proj_out_1(torch.nn.functional.silu(c)).chunk(2, dim=1)
    patches = network.proj_out_2(network.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
    height, width = x.shape[2] // 2, x.shape[3] // 2
    pixels = patches.reshape(len(x), height, width, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(len(x), -1, *x.shape[2:])


def test_it_begins_as_zero_and_its_blocks_as_the_identity():
    network = DiT(4, 4, 8, 2, 32, 2, num_heads=2, context_dim=6)
    x, context = torch.randn(2, 16, 32), torch.randn(2, 3, 6)
    for block in network.blocks:
        assert torch.equal(block(x, torch.randn(2, 32), context), x)
    assert not network(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), context).any()


@pytest.mark.parametrize("options", [BlockOptions(), LIGHTNING, BlockOptions(rotary=True, qk_norm=True)])
def test_recomputed_activations_give_the_same_gradients(options):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 9])
    gradients = []
    for checkpoint in (False, True):
        network = small(options=dataclasses.replace(options, checkpoint=checkpoint))
        network(x, t).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rotated_attention_depends_on_distances_only():
    angles = rotary_angles(8, 4, 6, 4).unflatten(0, (4, 6))
    q, k = torch.randn(8), torch.randn(8)

    def score(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        turned = [rotate(x[None], angles[p].cos()[None], angles[p].sin()[None]) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score((0, 0), (2, 3)), score((1, 2), (3, 5)))
    assert not torch.allclose(score((0, 0), (2, 3)), score((0, 0), (3, 3)))


def test_positions_of_other_sizes_span_the_trained_range():
    trained, larger = sincos_positions(16, 4, 4, 4), sincos_positions(16, 8, 8, 4)
    every_second = larger.unflatten(0, (8, 8))[::2, ::2].flatten(0, 1)
    torch.testing.assert_close(every_second, trained)
    assert torch.equal(small().pos_embed[0], sincos_positions(32, 4, 4, 4))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hidden_size": 30}, "hidden_size is 30"),
        ({"num_heads": 3}, "num_heads"),
        ({"patch_size": 3}, "input_size is 8"),
        ({"hidden_size": 36, "num_heads": 6, "options": BlockOptions(rotary=True)}, "hidden_size / num_heads is 6"),
    ],
)
def test_what_does_not_divide_is_refused(wrong, named):
    with pytest.raises(UserError, match=named):
        small(**wrong)
