"""The kernels of gated units, run by Triton's interpreter, against float64; and torch's where they do not serve."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.networks import fused_gate
from ldm.networks.attention import GEGLU
from ldm.networks.dit_blocks import SwiGLU

SHAPES = ((2, 3, 10), (5, 2600), (1, 2))  # more than a program, a part of one, a single output
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the largest: that of the dtype
KINDS = (("gelu", False), ("silu", True))


@pytest.fixture(scope="module")
def interpreted(interpreted_copy: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpreted_copy(fused_gate)


def obvious(halves: Tensor, activation: str, gate_first: bool) -> Tensor:
    halves = halves.chunk(2, -1)
    return halves[gate_first] * getattr(F, activation)(halves[not gate_first])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("activation", "gate_first"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(
    interpreted: ModuleType, shape: tuple[int, ...], activation: str, gate_first: bool, dtype: torch.dtype
) -> None:
    halves = (torch.randn(shape) * 4).to(dtype)
    halves.view(-1)[0] = -120.0  # exp overflows
    dy = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    exact, runs = halves.double().requires_grad_(), []
    expected = obvious(exact, activation, gate_first)
    expected.backward(dy.double())
    for _ in range(2):
        own = halves.clone().requires_grad_()
        assert interpreted.takes(own)
        y = interpreted.gated(own, activation, gate_first)
        y.backward(dy)
        runs.append((y.detach(), own.grad))
    for value, right in zip(runs[0], (expected.detach(), exact.grad), strict=True):
        assert value.dtype == dtype and value.is_contiguous()
        assert float((value.double() - right).abs().max()) <= TOLERANCE[dtype] * float(right.abs().max() + 1e-30)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize(("activation", "gate_first"), KINDS)
def test_second_derivatives_are_those_of_torch(interpreted: ModuleType, activation: str, gate_first: bool) -> None:
    halves = torch.randn(3, 12)

    def penalty(gated: Callable[..., Tensor]) -> Tensor:
        own = halves.clone().requires_grad_()
        (dx,) = torch.autograd.grad(gated(own, activation, gate_first).square().sum(), own, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), own)[0]

    torch.testing.assert_close(penalty(interpreted.gated), penalty(obvious), rtol=1e-4, atol=1e-4)


def test_other_inputs_are_left_to_torch(interpreted: ModuleType) -> None:
    halves = torch.randn(4, 6)
    assert interpreted.takes(halves) and not fused_gate.takes(halves)  # on a CPU
    for other in (halves.double(), halves.T, halves[:0]):
        assert not interpreted.takes(other)
    torch.testing.assert_close(interpreted.gated(halves.T[:, :2], "gelu"), obvious(halves.T[:, :2], "gelu", False))


def test_the_layers_say_which_half_is_the_gate() -> None:
    for layer, projection, rest, kind in (
        (geglu := GEGLU(4, 6), geglu.proj, torch.nn.Identity(), KINDS[0]),
        (swiglu := SwiGLU(4, 6), swiglu.w12, swiglu.w3, KINDS[1]),
    ):
        x = torch.randn(2, 3, 4)
        assert torch.equal(layer(x), rest(obvious(projection(x), *kind)))
