"""Gated linear units value * f(gate), f = GELU or SiLU, as one Triton kernel forwards and one backwards.

Value and gate are halves of one projection, so each is strided, and torch's kernels run on them one after the other and
unvectorised. Here both halves are read once; f is computed in float32 and the product is rounded once. Gradients:
    d value = dy f(gate),  d gate = dy value f'(gate)
with GELU f(z) = z P(z), f'(z) = P(z) + z p(z), P and p the distribution and density of a standard normal variable
(Hendrycks and Gimpel, arXiv 1606.08415), and SiLU f(z) = z s(z), f'(z) = s(z) (1 + z (1 - s(z))), s the sigmoid.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.networks.fused_norm import computes_on_cuda, differentiable, launch, serves

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_COLUMNS = 1024  # outputs of a program
_INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Activation = Literal["gelu", "silu"]


def gated(halves: Tensor, activation: Activation, gate_first: bool = False) -> Tensor:
    """Return value * f(gate) of a projection (..., 2 D) with the halves value and gate, or the reverse: (..., D)."""
    if takes(halves):
        with torch.cuda.device_of(halves):
            return _Gated.apply(halves, activation == "silu", gate_first)
    return _by_torch(halves, activation == "silu", gate_first)


def _by_torch(halves: Tensor, silu: bool, gate_first: bool) -> Tensor:
    first, second = halves.chunk(2, dim=-1)
    value, gate = (second, first) if gate_first else (first, second)
    return (F.silu(gate) if silu else F.gelu(gate)) * value


def takes(halves: Tensor) -> bool:
    """Return whether the kernels take this input: contiguous, on CUDA. Compiled networks fuse torch's by themselves."""
    if torch.compiler.is_compiling() or not (computes_on_cuda(halves) or _INTERPRETED):
        return False
    if halves.dtype not in _DTYPES or halves.numel() == 0 or not halves.is_contiguous():
        return False
    return _INTERPRETED or serves(halves)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halves: Tensor, silu: bool, gate_first: bool) -> Tensor:
        width = halves.shape[-1] // 2
        y = halves.new_empty((*halves.shape[:-1], width))
        ctx.save_for_backward(halves)
        ctx.options = {"SILU": silu, "GATE_FIRST": gate_first, "K": _COLUMNS}
        launch(_forward, _grid(y), halves, y, width, **ctx.options)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (halves,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable(
                ctx, dy, lambda x: _by_torch(x, ctx.options["SILU"], ctx.options["GATE_FIRST"]), halves
            )
        dx, dy = torch.empty_like(halves), dy.contiguous()
        launch(_backward, _grid(dy), halves, dy, dx, dy.shape[-1], **ctx.options)
        return dx, None, None


def _grid(y: Tensor) -> tuple[int, int]:
    return y.numel() // y.shape[-1], triton.cdiv(y.shape[-1], _COLUMNS)


if triton is not None:

    @triton.jit
    def _loaded(x_ptr, width, GATE_FIRST: tl.constexpr, K: tl.constexpr):
        """Return the places of a row's outputs, of values and of gates, which exist, and value and gate in float32."""
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * K + tl.arange(0, K)
        inside = column < width
        first = row * 2 * width + column
        value_at = first + width if GATE_FIRST else first
        gate_at = first if GATE_FIRST else first + width
        value = tl.load(x_ptr + value_at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
        return row * width + column, value_at, gate_at, inside, value, gate

    @triton.jit
    def _share(gate, SILU: tl.constexpr):
        """Return f(gate) / gate."""
        if SILU:
            return 1.0 / (1.0 + tl.exp(-gate))
        else:
            return 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))

    @triton.jit
    def _forward(x_ptr, y_ptr, width, SILU: tl.constexpr, GATE_FIRST: tl.constexpr, K: tl.constexpr):
        """Write the outputs of a part of a row."""
        place, _, _, inside, value, gate = _loaded(x_ptr, width, GATE_FIRST, K)
        y = value * gate * _share(gate, SILU)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward(x_ptr, dy_ptr, dx_ptr, width, SILU: tl.constexpr, GATE_FIRST: tl.constexpr, K: tl.constexpr):
        """Write the gradients by the values and gates of a part of a row."""
        place, value_at, gate_at, inside, value, gate = _loaded(x_ptr, width, GATE_FIRST, K)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        share = _share(gate, SILU)
        if SILU:
            slope = share * (1.0 + gate * (1.0 - share))
        else:
            slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        kind = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + value_at, (dy * gate * share).to(kind), mask=inside)
        tl.store(dx_ptr + gate_at, (dy * value * slope).to(kind), mask=inside)
