"""The U-Net: published sizes, invariances, memory formats, precision, options, and errors."""

import pytest
import torch

from ldm.errors import UserError
from ldm.networks.unet import UNet, UNetOptions

TINY = {"in_channels": 4, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2)}
SELF = TINY | {"attention_factors": (2,), "num_head_channels": 16}
CROSS = TINY | {"attention_factors": (1, 2), "num_heads": 4, "context_dim": 6}
UPDOWN = UNetOptions(scale_shift_norm=True, resblock_updown=True)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    return {"x": x, "t": torch.tensor([3, 700]), "context": context}


@pytest.mark.parametrize(
    ("parameters", "config"),
    [
        (274056163, {"model_channels": 224, "channel_mult": (1, 2, 3, 4), "num_head_channels": 32}),
        (400920579, {"model_channels": 192, "channel_mult": (1, 2, 3, 5), "num_heads": 1, "context_dim": 512}),
        (
            294966916,
            {
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 192,
                "attention_factors": (1, 2, 4, 8),
                "channel_mult": (1, 2, 2, 4, 4),
                "num_heads": 8,
                "options": UPDOWN,
            },
        ),
        (
            872300484,
            {
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 320,
                "attention_factors": (4, 2, 1),
                "channel_mult": (1, 2, 4, 4),
                "num_heads": 8,
                "context_dim": 1280,
            },
        ),
    ],
)
def test_published_networks_have_their_published_sizes(parameters, config):
    with torch.device("meta"):
        unet = UNet(**({"in_channels": 3, "out_channels": 3} | config))
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


def test_state_dict_positions_are_the_published_ones():
    names = set(UNet(**CROSS, num_classes=5, codebook_size=11).state_dict())
    assert {"time_embed.0.weight", "time_embed.2.bias", "label_emb.weight", "input_blocks.0.0.weight"} <= names
    assert {"input_blocks.1.0.in_layers.2.weight", "input_blocks.1.1.proj_in.weight"} <= names
    assert {"input_blocks.2.0.op.weight", "middle_block.1.norm.weight", "middle_block.2.out_layers.3.bias"} <= names
    assert {"output_blocks.1.2.conv.weight", "out.2.weight", "id_predictor.1.weight"} <= names
    assert "input_blocks.2.0.in_layers.2.weight" in UNet(**SELF, options=UPDOWN).state_dict()


def test_fresh_network_predicts_zero(batch):
    assert not UNet(**CROSS)(**batch).any()


def test_samples_of_a_batch_do_not_influence_each_other(randomised, batch):
    unet = randomised(UNet(**CROSS))
    alone = unet(**{name: value[1:] for name, value in batch.items()})
    torch.testing.assert_close(unet(**batch)[1:], alone, atol=1e-5, rtol=1e-5)


def test_every_input_matters(randomised, batch):
    unet = randomised(UNet(**CROSS, num_classes=5))
    y = torch.tensor([0, 1])
    out = unet(**batch, y=y)
    assert out.shape == (2, 3, 8, 8)
    changed = {"x": batch["x"] + 1, "t": batch["t"] + 1, "context": batch["context"] + 1, "y": y + 1}
    for name, value in changed.items():
        assert (unet(**(batch | {"y": y, name: value})) - out).abs().max() > 1e-4, name


def test_fractional_times_are_accepted(randomised, batch):
    unet = randomised(UNet(**SELF))
    torch.testing.assert_close(unet(batch["x"], batch["t"].double()), unet(batch["x"], batch["t"]))
    assert not torch.equal(unet(batch["x"], batch["t"] + 0.5), unet(batch["x"], batch["t"]))


def test_context_of_the_networks_own_width_may_be_left_out(randomised, batch):
    unet = randomised(UNet(**(TINY | {"channel_mult": (1, 1), "num_heads": 2, "context_dim": 32})))
    assert unet(batch["x"], batch["t"]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("options", [UNetOptions(), UPDOWN, UNetOptions(conv_resample=False)])
@pytest.mark.parametrize("config", [SELF, CROSS], ids=["self", "cross"])
def test_channels_last_flows_through_and_changes_no_number(randomised, batch, config, options):
    unet = randomised(UNet(**config, options=options))
    batch = batch if "context_dim" in config else {"x": batch["x"], "t": batch["t"]}
    expected = unet(**batch)
    unet.to(memory_format=torch.channels_last)
    broken = []
    for name, module in unet.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, out, name=name: (
                broken.append(name)
                if out.ndim == 4 and not out.is_contiguous(memory_format=torch.channels_last)
                else None
            )
        )
    batch["x"] = batch["x"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(unet(**batch), expected, atol=1e-4, rtol=1e-4)
    assert broken == []


@pytest.mark.parametrize("config", [SELF, CROSS], ids=["self", "cross"])
def test_bfloat16_autocast_agrees_with_float32(randomised, batch, config):
    unet = randomised(UNet(**config))
    batch = batch if "context_dim" in config else {"x": batch["x"], "t": batch["t"]}
    expected = unet(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unet(**batch)
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.03 * expected.norm()


def test_half_weights_compute_in_half_and_return_the_inputs_dtype(randomised, batch):
    unet = randomised(UNet(**CROSS))
    expected = unet(**batch)
    out = unet.bfloat16()(**batch)
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.05 * expected.norm()
    assert unet(**(batch | {"x": batch["x"].bfloat16()})).dtype == torch.bfloat16


@pytest.mark.parametrize("config", [SELF, CROSS], ids=["self", "cross"])
def test_checkpointing_changes_no_gradient(randomised, batch, config):
    gradients = []
    for checkpoint in (False, True):
        options = UNetOptions(dropout=0.2, checkpoint=checkpoint)
        unet = randomised(UNet(**config, options=options)).train()
        x = batch["x"].clone().requires_grad_()
        torch.manual_seed(1)
        unet(x, batch["t"], batch["context"] if "context_dim" in config else None).square().sum().backward()
        gradients.append([x.grad] + [parameter.grad for parameter in unet.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_codebook_logits_replace_the_output(randomised, batch):
    unet = randomised(UNet(**SELF, codebook_size=11))
    assert unet(batch["x"], batch["t"]).shape == (2, 11, 8, 8)


@pytest.mark.parametrize(("dims", "size"), [(1, (8,)), (3, (3, 8, 8))])
@pytest.mark.parametrize("updown", [False, True])
def test_sequences_and_volumes(randomised, dims, size, updown):
    unet = randomised(UNet(**SELF, options=UNetOptions(dims=dims, resblock_updown=updown)))
    assert unet(torch.randn(2, 4, *size), torch.tensor([1, 2])).shape == (2, 3, *size)


def test_heads_of_the_decoder_change_its_function_but_no_parameter(randomised, batch):
    config = TINY | {"attention_factors": (2,), "num_heads": 2}
    plain = randomised(UNet(**config))
    other = randomised(UNet(**config, options=UNetOptions(num_heads_upsample=4)))
    assert [block.num_heads for block in other.modules() if hasattr(block, "num_heads")] == [2, 2, 4, 4]
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert not torch.allclose(plain(batch["x"], batch["t"]), other(batch["x"], batch["t"]))


def test_levels_may_all_be_wider_than_the_model(batch):
    unet = UNet(**(SELF | {"channel_mult": (2, 2)}))
    assert unet(batch["x"], batch["t"]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, "exactly one"),
        ({"num_head_channels": None}, "exactly one"),
        ({"num_head_channels": 128}, "heads"),
        ({"model_channels": 40}, "40 channels"),
    ],
)
def test_impossible_networks_are_user_errors(changes, message):
    with pytest.raises(UserError, match=message):
        UNet(**(SELF | changes))


def test_unknown_options_are_user_errors():
    with pytest.raises(UserError, match="dims=4"):
        UNetOptions(dims=4)
    with pytest.raises(UserError, match="legacy, new"):
        UNet(**SELF, options=UNetOptions(qkv_order="old"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4, 8, 7)}, "multiple of 2"),
        ({"context": torch.zeros(2, 5, 7)}, "context_dim is 6"),
        ({"y": torch.tensor([0, 1])}, "num_classes"),
    ],
)
def test_wrong_inputs_are_user_errors(batch, changes, message):
    with pytest.raises(UserError, match=message):
        UNet(**CROSS)(**(batch | changes))


def test_wrong_class_ids_are_user_errors(batch):
    unet = UNet(**SELF, num_classes=5)
    with pytest.raises(UserError, match="num_classes"):
        unet(batch["x"], batch["t"])
    with pytest.raises(UserError, match="shape"):
        unet(batch["x"], batch["t"], y=torch.tensor([[0], [1]]))
