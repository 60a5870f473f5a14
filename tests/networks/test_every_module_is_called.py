"""Modules are called, never read past: what hangs on a layer (an adapter, a hook, FSDP, quantisation) takes effect."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ldm.networks.attention import AttentionPool2d, LinearAttention
from ldm.networks.discriminator import PatchDiscriminator
from ldm.networks.dit import DiT
from ldm.networks.dit_blocks import BlockOptions
from ldm.networks.encoder_decoder import Architecture, Decoder, Encoder
from ldm.networks.perceptual import LPIPS
from ldm.networks.pointwise import PointwiseConv1d, PointwiseConv2d
from ldm.networks.transformer import TransformerEncoder
from ldm.networks.unet import UNet, UNetOptions

UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": (1, 2), "num_heads": 2}
ARCH = {"channels": 32, "channel_mult": (1, 2), "attention_resolutions": (8,), "resolution": 8}
DIT = {"in_channels": 4, "out_channels": 4, "input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
LIGHTNING = BlockOptions(rotary=True, qk_norm=True, gated=True, rms_norm=True)
X, T = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
CONTEXT, Y = torch.randn(2, 3, 16), torch.tensor([0, 2])

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "unet with self-attention": (lambda: UNet(**UNET, attention_factors=(1, 2)), (X, T)),
    "unet with transformers": (
        lambda: UNet(**UNET, attention_factors=(1, 2), context_dim=16, num_classes=3),
        (X, T, CONTEXT, Y),
    ),
    "transformer of patches": (lambda: DiT(**DIT, context_dim=16, num_classes=3), (X, T, CONTEXT, Y)),
    "transformer of LightningDiT's blocks": (lambda: DiT(**DIT, options=LIGHTNING), (X, T)),
    "unet that resamples in its blocks": (lambda: UNet(**UNET, options=UNetOptions(resblock_updown=True)), (X, T)),
    "encoder": (lambda: Encoder(Architecture(**ARCH)), (torch.randn(2, 3, 8, 8),)),
    "decoder": (lambda: Decoder(Architecture(**ARCH)), (torch.randn(2, 3, 4, 4),)),
    "decoder with linear attention": (
        lambda: Decoder(Architecture(**ARCH, attention="linear")),
        (torch.randn(2, 3, 4, 4),),
    ),
    "linear attention": (lambda: LinearAttention(32), (torch.randn(2, 32, 4, 4),)),
    "attention pooling": (lambda: AttentionPool2d(4, 32, 16), (torch.randn(2, 32, 4, 4),)),
    "text transformer": (lambda: TransformerEncoder(50, 8, 32, 2), (torch.randint(50, (2, 5)),)),
    "discriminator": (lambda: PatchDiscriminator(width=8), (torch.randn(2, 3, 32, 32),)),
    "discriminator with actnorm": (lambda: PatchDiscriminator(width=8, actnorm=True), (torch.randn(2, 3, 32, 32),)),
    "lpips": (lambda: LPIPS(random_features=True), (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))),
}
UNUSED = {"to_logits"}  # stored in published checkpoints, used by nothing


@pytest.mark.parametrize("case", CASES)
def test_a_hook_on_every_leaf_module_fires_in_one_forward_pass(case: str) -> None:
    make, inputs = CASES[case]
    module = make()
    leaves = {
        name: leaf
        for name, leaf in module.named_modules()
        if not list(leaf.children()) and not isinstance(leaf, nn.ModuleList)  # an empty list is no layer
    }
    called = set()
    for name, leaf in leaves.items():
        leaf.register_forward_hook(lambda *_, name=name: called.add(name))
    module(*inputs)
    assert set(leaves) - called == UNUSED & set(leaves)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pointwise_convolution_can_be_replaced_by_a_plain_one(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 6, 3, 5).to(memory_format=memory_format)
    for layer, plain, inputs in (
        (PointwiseConv2d(6, 4), nn.Conv2d(6, 4, 1), x),
        (PointwiseConv2d(6, 4, bias=False), nn.Conv2d(6, 4, 1, bias=False), x),
        (PointwiseConv1d(6, 4), nn.Conv1d(6, 4, 1), x.flatten(2)),
    ):
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(inputs), plain(inputs))
