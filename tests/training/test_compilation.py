"""Which parts are compiled, each on its own; nothing is compiled here."""

import pytest
import torch
from tiny import ARCHITECTURE, autoencoder_training, class_diffusion
from torch import nn

from ldm.networks.encoder_decoder import Architecture, Decoder, Encoder, ResnetBlock
from ldm.training.compilation import Compilation, regions
from ldm.training.devices import matmul_precision


def test_blocks_are_compiled_and_the_last_layer_is_not() -> None:
    training = autoencoder_training()
    Compilation(mode="max-autotune-no-cudagraphs").apply(training.networks())
    compiled = {name for name, part in training.named_modules() if part._compiled_call_impl is not None}
    assert "loss.discriminator" in compiled and "model.decoder.mid.block_1" in compiled
    assert not compiled & {"model.decoder", "model.encoder", "model.decoder.conv_out"}


def test_a_latent_model_compiles_its_encoder_too() -> None:
    training = class_diffusion()
    Compilation().apply(training.networks())
    compiled = {name for name, part in training.named_modules() if part._compiled_call_impl is not None}
    assert {"model.model.diffusion_model.middle_block", "model.first_stage_model.encoder.mid.block_2"} <= compiled


@pytest.mark.parametrize("make", [Encoder, Decoder])
def test_blocks_are_all_repeated_parts_and_none_contains_another(make: type[nn.Module]) -> None:
    network = make(Architecture(**{**ARCHITECTURE, "attention_resolutions": (8,)}))
    blocks = regions(network)
    assert {id(part) for part in network.modules() if isinstance(part, ResnetBlock)} <= {id(block) for block in blocks}
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not inner & {id(block) for block in blocks}
    assert regions(nn.Linear(2, 2))[0].in_features == 2


def test_the_precision_of_products_is_given_back() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
