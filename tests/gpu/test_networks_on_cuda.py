"""Kernels and layouts on CUDA: the same numbers, bit-stable, and no copy from one memory format to the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import autoencoder
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ldm.networks import fused_gate, fused_norm
from ldm.networks.attention import by_products
from ldm.networks.layers import GroupNorm32
from ldm.networks.unet import UNet
from ldm.training.compilation import Compilation

NARROW = {"model_channels": 64, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_factors": (2,)}
LAYOUT_KERNELS = ("nchwtonhwc", "nhwctonchw")


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def unet() -> UNet:
    network = UNet(4, 4, num_heads=2, **NARROW).cuda().to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.mark.parametrize("shape", [(4, 224, 16, 16), (2, 320, 7, 5), (2, 128, 64, 64)])
@pytest.mark.parametrize("activate", [False, True])
def test_group_norm_is_torch_s_within_bfloat16_and_bit_stable(shape: tuple[int, ...], activate: bool) -> None:
    norm = GroupNorm32(shape[1]).cuda()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, dy = (cuda(*shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    runs = []
    for _ in range(2):
        own = x.clone().requires_grad_()
        assert fused_norm.takes(own)
        norm.zero_grad()
        y = norm(own, activate=activate)
        y.backward(dy)
        runs.append((y.detach(), own.grad, norm.weight.grad.clone(), norm.bias.grad.clone()))
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    exact = x.double().requires_grad_()
    expected = F.group_norm(exact, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    expected = F.silu(expected) if activate else expected
    expected.backward(dy.double())
    for value, right in ((runs[0][0], expected), (runs[0][1], exact.grad)):
        assert float((value.double() - right).abs().max() / right.abs().max()) < 8e-3


def test_a_step_of_the_unet_copies_no_layout() -> None:
    network, x = unet(), cuda(2, 4, 32, 32).contiguous(memory_format=torch.channels_last)
    t = torch.zeros(2, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            network(x, t).float().square().mean().backward()

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    names = [event.key.lower() for event in profiled.key_averages()]
    assert names and not [name for name in names if any(word in name for word in LAYOUT_KERNELS)]


@pytest.mark.parametrize(("activation", "gate_first"), [("gelu", False), ("silu", True)])
def test_gated_units_are_torch_s_within_bfloat16_and_bit_stable(activation: str, gate_first: bool) -> None:
    halves, dy, runs = cuda(3, 77, 2 * 1280) * 3, cuda(3, 77, 1280), []
    exact = halves.double().requires_grad_()
    parts = exact.chunk(2, -1)
    right = parts[gate_first] * getattr(F, activation)(parts[not gate_first])
    right.backward(dy.double())
    for _ in range(2):
        own = halves.clone().requires_grad_()
        assert fused_gate.takes(own)
        y = fused_gate.gated(own, activation, gate_first)
        y.backward(dy)
        runs.append((y.detach(), own.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    for value, expected in zip(runs[0], (right, exact.grad), strict=True):
        assert float((value.double() - expected).abs().max() / expected.abs().max()) < 4e-3


@pytest.mark.parametrize("width", [320, 512])
def test_wide_heads_by_products_are_those_of_the_fused_kernel(width: int) -> None:
    inputs = [cuda(2, 1, 64, width).requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, right = by_products(*inputs), F.scaled_dot_product_attention(*exact)
    dy = cuda(2, 1, 64, width)
    out.backward(dy), right.backward(dy.double())
    for value, expected in ((out, right), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))):
        assert float((value.double() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("precision", ["tf32", "bf16", "compiled"])
def test_a_forward_pass_is_that_of_float32_on_a_cpu(precision: str) -> None:
    network, x, t = unet(), torch.randn(2, 4, 32, 32), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        right = network.float().cpu()(x, t)
        network = network.cuda()
        if precision == "compiled":
            Compilation().apply([network])
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            out = network(x.cuda(), t.cuda()).float().cpu()
        torch.backends.cuda.matmul.allow_tf32 = False
    band = {"tf32": 5e-3, "bf16": 3e-2, "compiled": 5e-3}[precision]  # convolutions use TF32 in all of them
    assert float((out - right).norm() / right.norm()) < band


def test_a_first_stage_on_cuda_is_that_on_a_cpu() -> None:
    first_stage, x = autoencoder().eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        right = first_stage.encode_mode(x)
        out = first_stage.cuda().encode_mode(x.cuda()).cpu()
    torch.testing.assert_close(out, right, rtol=5e-3, atol=5e-3)
