"""The kernels of group norm, run by Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.networks import fused_norm
from ldm.training.memory import SavedTensors

SHAPES = ((2, 32, 3, 5), (1, 96, 9, 10), (2, 160, 1, 2))  # more than a tile, parts of tiles, groups of 1, 3 and 5
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the largest: that of the dtype


@pytest.fixture(scope="module")
def interpreted(interpreted_copy: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpreted_copy(fused_norm)


def images(shape: tuple[int, ...], dtype: torch.dtype, shift: float = 0.0) -> Tensor:
    x = torch.randn(shape) * 2 + 0.5 + shift
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def near(value: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    return float((value.double() - exact).abs().max() / exact.abs().max()) <= TOLERANCE[dtype]


def cases() -> list[Any]:
    """Return every shape, type and activation; the activations take turns in the slow suite, the others are proofs."""
    found: list[Any] = []
    for number, case in enumerate(product(SHAPES, TOLERANCE, (False, True))):
        is_quick, is_turn = case == (SHAPES[0], torch.bfloat16, True), (number + number // 2) % 2 == 0
        mark = pytest.mark.slow if is_turn else pytest.mark.proof
        found.append(case if is_quick else pytest.param(*case, marks=mark))
    return found


@pytest.mark.parametrize(("shape", "dtype", "activate"), cases())
def test_values_and_gradients_are_those_of_float64(
    interpreted: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, activate: bool
) -> None:
    x, dy = images(shape, dtype), images(shape, dtype)
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.group_norm(exact[0], 32, exact[1], exact[2], 1e-5)
    expected = F.silu(expected) if activate else expected
    expected.backward(dy.double())
    runs = []
    for _ in range(2):
        own = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        assert interpreted.takes(own[0])
        y = interpreted.group_norm(*[own[0], 32, own[1], own[2], 1e-5], activate)
        y.backward(dy)
        runs.append([y.detach(), *(tensor.grad for tensor in own)])
    y, dx, dw, db = runs[0]
    assert y.dtype == dx.dtype == dtype and dw.dtype == db.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous(memory_format=torch.channels_last)
    assert near(y, expected.detach(), dtype) and near(dx, exact[0].grad, dtype)
    assert near(dw, exact[1].grad, torch.float32) and near(db, exact[2].grad, torch.float32)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_a_large_mean_does_not_cancel(interpreted: ModuleType) -> None:
    x = images((1, 64, 12, 12), torch.float32, shift=3000.0)
    y = interpreted.group_norm(x, 32, torch.ones(64), torch.zeros(64), 1e-5)
    expected = F.group_norm(x.double(), 32, None, None, 1e-5)
    assert float((y.double() - expected).abs().max()) < 1e-3  # float32 has 2e-4 at 3000


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_without_data_the_same_is_kept(interpreted: ModuleType, shape: tuple[int, ...]) -> None:
    def kept_by(module: ModuleType) -> int:
        x = images(shape, torch.bfloat16).requires_grad_()
        weight, bias = (torch.ones(shape[1], requires_grad=True) for _ in range(2))
        assert module.takes(x)
        kept = SavedTensors([])
        with kept:
            y = module.group_norm(x, 32, weight, bias, 1e-5, True)
        y.backward(torch.ones_like(y))
        assert y.stride() == x.grad.stride() == x.stride()
        return kept.bytes

    launched = kept_by(interpreted)
    with FakeTensorMode(), fused_norm.counted_as_on_cuda():
        assert kept_by(fused_norm) == launched
    with FakeTensorMode():
        assert not fused_norm.takes(images(shape, torch.bfloat16))


def test_a_machine_that_compiles_nothing_is_told_so_in_one_line(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def launch(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(interpreted, "launch", launch)
    interpreted.is_available.cache_clear()
    assert not interpreted.takes(images((2, 32, 3, 5), torch.float32))
    interpreted.is_available.cache_clear()
    (line,) = caplog.messages
    assert "C compiler" in line and "torch's kernels are used" in line and "\n" not in line


def test_second_derivatives_are_those_of_torch(interpreted: ModuleType) -> None:
    x, weight, bias = images((1, 64, 3, 2), torch.float32), torch.randn(64), torch.randn(64)

    def penalty(norm: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        own = [tensor.clone().requires_grad_() for tensor in inputs]
        (dx,) = torch.autograd.grad(norm(*own).square().sum(), own[0], create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), own))

    ours = penalty(lambda *own: interpreted.group_norm(own[0], 32, own[1], own[2], 1e-5, True), x, weight, bias)
    torchs = penalty(lambda *own: F.silu(F.group_norm(own[0], 32, own[1], own[2], 1e-5)), x, weight, bias)
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_other_inputs_are_left_to_torch(interpreted: ModuleType) -> None:
    x = images((2, 32, 3, 5), torch.float32)
    assert interpreted.takes(x) and not fused_norm.takes(x)  # on a CPU
    for other in (x.contiguous(), x.double(), x[..., 0], x[:0], torch.zeros(2, 32, 4, 4, 4)):
        assert not interpreted.takes(other)
