"""Group norm, with SiLU behind it if asked, as Triton kernels on channels-last memory.

torch's kernel for CUDA returns contiguous memory for channels-last input, so that every convolution around it pays a
copy. Here y = silu((x - mean) rstd w + b) is read and written once, the statistics are those of float32, and no sum
depends on the order in which blocks run: the same input gives the same bits.

Means and squared deviations of tiles are merged by the formula of Chan et al. (1979), which does not cancel. With z the
argument of silu, dz = dy silu'(z), x^ = (x - mean) rstd and averages over the group:
    dx = rstd (w dz - avg(w dz) - x^ avg(w dz x^)),  dw = sum dz x^,  db = sum dz

On tensors without data (torch's fake tensors) no kernel is launched: what it would write is allocated, which is all
that memory and layout depend on. So the cost of a step on a GPU is known on a machine without one.

Legend: B batch, N positions, C channels, G groups, S tiles of `_ROWS` positions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ldm.errors import shown

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_ROWS, _COLUMNS = 64, 64  # positions and channels of a tile
_TILES = 32  # that are merged at a time
_CAPABILITY = (8, 0)  # of the oldest cards that Triton compiles bfloat16 for
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_log = logging.getLogger(__name__)
_counted: ContextVar[bool] = ContextVar("counted as on CUDA", default=False)


def computes_on_cuda(x: Tensor) -> bool:
    """Return whether a tensor lies on CUDA, or is counted as if it did."""
    return x.is_cuda or (_counted.get() and isinstance(x, FakeTensor))


@contextmanager
def counted_as_on_cuda(enabled: bool = True) -> Iterator[None]:
    """Take tensors without data, inside a block, for some on a CUDA card whose kernels Triton compiles."""
    token = _counted.set(enabled)
    try:
        yield
    finally:
        _counted.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel in a grid of programs; the first argument is a tensor."""
    if not isinstance(arguments[0], FakeTensor):
        kernel[grid](*arguments, **options)


def takes(x: Tensor) -> bool:
    """Return whether the kernels take this input: images or tokens on CUDA, channels last in memory.

    Compiled networks keep torch's, which their compiler fuses. What a machine lacks is said once.
    """
    if torch.compiler.is_compiling() or not (computes_on_cuda(x) or _INTERPRETED):
        return False
    if x.dtype not in _DTYPES or x.numel() == 0:
        return False
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return is_last and serves(x)


def serves(x: Tensor) -> bool:
    """Return whether kernels run where a tensor lies; those of tensors without data are only counted."""
    return triton is not None if isinstance(x, FakeTensor) else is_available(x.device)


@cache
def is_available(device: torch.device) -> bool:
    """Return whether the kernels run on a device; if not, one line says why."""
    problem = _problem(device)
    if problem:
        _log.warning("group norm: %s; torch's kernels are used, which copy channels-last images", problem)
    return not problem


def _problem(device: torch.device) -> str:
    """Return why kernels do not run on a device, "" if they do."""
    if triton is None:
        return "Triton is not installed"
    if not _INTERPRETED and torch.cuda.get_device_capability(device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        x = torch.zeros(1, device=device)
        with torch.cuda.device_of(x):
            launch(_moments, (1, 1), x, x.clone(), x.clone(), 1, 1, 1, R=_ROWS, K=_COLUMNS)
    except Exception as error:  # whatever Triton meets: no C compiler, no headers of Python, too old a driver
        return f"Triton compiles nothing here ({shown(f'{type(error).__name__}: {error}', 120)})"
    return ""


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activate: bool = False) -> Tensor:
    """Return the group norm of x (B, C, H, W), channels last, with SiLU if `activate`, in the dtype of x."""
    with torch.cuda.device_of(x):
        return _GroupNorm.apply(x, weight, bias, groups, eps, activate)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activate: bool) -> Tensor:
        batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        tiles, parts = triton.cdiv(positions, _ROWS), triton.cdiv(channels, _COLUMNS)
        means, squares = (x.new_empty((batch, tiles, channels), dtype=torch.float32) for _ in range(2))
        mean, rstd = (x.new_empty((batch, groups), dtype=torch.float32) for _ in range(2))
        y = torch.empty_like(x)
        width = channels // groups
        shape = (positions, channels, tiles, groups, width)
        grid, tile = (batch * tiles, parts), {"R": _ROWS, "K": _COLUMNS}
        launch(_moments, grid, x, means, squares, positions, channels, tiles, **tile)
        block = {"R": _ROWS, "T": _TILES, "D": triton.next_power_of_2(width)}
        launch(_merge, (batch * groups,), means, squares, mean, rstd, *shape, eps, **block)
        launch(_normalise, grid, x, y, weight, bias, mean, rstd, *shape, ACTIVATE=activate, **tile)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape, ctx.activate, ctx.options = shape, activate, (groups, eps, activate)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            groups, eps, activate = ctx.options
            return differentiable(ctx, dy, lambda x, w, b: by_torch(x, groups, w, b, eps, activate), x, weight, bias)
        positions, channels, tiles, groups, width = ctx.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        batch, parts = len(x), triton.cdiv(channels, _COLUMNS)
        grid, tile = (batch * tiles, parts), {"R": _ROWS, "K": _COLUMNS, "ACTIVATE": ctx.activate}
        sums, products = (x.new_empty((batch, tiles, channels), dtype=torch.float32) for _ in range(2))
        launch(_gradient_sums, grid, x, dy, weight, bias, mean, rstd, sums, products, *ctx.shape, **tile)
        db, dw = sums.sum(1), products.sum(1)  # (B, C), of each sample
        of_group = [(weight * part).view(batch, groups, width).sum(2) / (positions * width) for part in (db, dw)]
        dx = torch.empty_like(x)
        launch(_gradient, grid, x, dy, dx, weight, bias, mean, rstd, *of_group, *ctx.shape, **tile)
        return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(bias.dtype), None, None, None


def by_torch(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activate: bool = False) -> Tensor:
    """Return the same as `group_norm`, of x (B, C, ...), by torch's kernels."""
    if x.dtype == weight.dtype:
        y = _torch_norm(x, groups, weight, bias, eps).to(x.dtype)
    else:
        # The kernels accumulate half inputs in float32 themselves; left to autocast they would copy x to float32.
        with torch.autocast(x.device.type, enabled=False):
            y = _torch_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y) if activate else y


def _torch_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Call what `F.group_norm` calls, which itself refuses the single value of an image of one latent."""
    return torch.group_norm(x, groups, weight, bias, eps, torch.backends.cudnn.enabled)


def differentiable(ctx: Any, dy: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of function(*inputs) as torch computes them, for a backward pass that is differentiated.

    None for the other arguments of the forward pass, and for inputs without a gradient.
    """
    wanted = [x for x, needs in zip(inputs, ctx.needs_input_grad, strict=False) if needs]
    found = iter(torch.autograd.grad(function(*inputs), wanted, dy, create_graph=True))
    return tuple(next(found) if needs else None for needs in ctx.needs_input_grad)


if triton is not None:

    @triton.jit
    def _place(positions, channels, tiles, R: tl.constexpr, K: tl.constexpr):
        """Return the offsets (R, K) of a tile and which of them are in the image, its channels, sample and number."""
        number = tl.program_id(0)
        row = number % tiles * R + tl.arange(0, R)
        column = tl.program_id(1) * K + tl.arange(0, K)
        offsets = (number // tiles * positions + row).to(tl.int64)[:, None] * channels + column[None, :]
        return offsets, (row < positions)[:, None] & (column < channels)[None, :], column, number // tiles, number

    @triton.jit
    def _moments(x_ptr, mean_ptr, square_ptr, positions, channels, tiles, R: tl.constexpr, K: tl.constexpr):
        """Write mean and sum of squared deviations of each channel in a tile."""
        offsets, inside, column, _, number = _place(positions, channels, tiles, R, K)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(positions - number % tiles * R, R)
        mean = tl.sum(x, 0) / count
        deviation = tl.where(inside, x - mean[None, :], 0.0)
        tl.store(mean_ptr + number * channels + column, mean, mask=column < channels)
        tl.store(square_ptr + number * channels + column, tl.sum(deviation * deviation, 0), mask=column < channels)

    @triton.jit
    def _merge(
        means_ptr, squares_ptr, mean_ptr, rstd_ptr, positions, channels, tiles, groups, width, eps,
        R: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    ):  # fmt: skip
        """Write mean and reciprocal standard deviation of a group of a sample."""
        sample, group = tl.program_id(0) // groups, tl.program_id(0) % groups
        channel = tl.arange(0, D)
        total = tl.zeros((D,), tl.float32)
        for start in range(0, tiles, T):
            tile = start + tl.arange(0, T)
            inside = (tile < tiles)[:, None] & (channel < width)[None, :]
            place = (sample * tiles + tile)[:, None] * channels + group * width + channel[None, :]
            count = tl.minimum(positions - tile * R, R).to(tl.float32)[:, None]
            total += tl.sum(tl.load(means_ptr + place, mask=inside, other=0.0) * count, 0)
        mean = tl.sum(total, 0) / (positions * width)
        total = tl.zeros((D,), tl.float32)
        for start in range(0, tiles, T):
            tile = start + tl.arange(0, T)
            inside = (tile < tiles)[:, None] & (channel < width)[None, :]
            place = (sample * tiles + tile)[:, None] * channels + group * width + channel[None, :]
            count = tl.minimum(positions - tile * R, R).to(tl.float32)[:, None]
            shift = tl.where(inside, tl.load(means_ptr + place, mask=inside, other=0.0) - mean, 0.0)
            total += tl.sum(tl.load(squares_ptr + place, mask=inside, other=0.0) + shift * shift * count, 0)
        rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / (positions * width) + eps)
        tl.store(mean_ptr + tl.program_id(0), mean)
        tl.store(rstd_ptr + tl.program_id(0), rstd)

    @triton.jit
    def _statistics(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, sample, channels, groups, width):
        """Return weight, bias, mean and rstd of channels, each (K,)."""
        inside, group = column < channels, sample * groups + column // width
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + group, mask=inside, other=0.0)
        return weight, bias, mean, tl.load(rstd_ptr + group, mask=inside, other=0.0)

    @triton.jit
    def _normalise(
        x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, positions, channels, tiles, groups, width,
        ACTIVATE: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """Write the normalised tile."""
        offsets, inside, column, sample, _ = _place(positions, channels, tiles, R, K)
        weight, bias, mean, rstd = _statistics(
            weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, sample, channels, groups, width
        )
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        if ACTIVATE:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _pulled(x_ptr, dy_ptr, offsets, inside, weight, bias, mean, rstd, ACTIVATE: tl.constexpr):
        """Return the normalised tile, and the gradient by what stands before SiLU."""
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        normal = (x - mean[None, :]) * rstd[None, :]
        if ACTIVATE:
            z = normal * weight[None, :] + bias[None, :]
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dz = dz * sigmoid * (1.0 + z * (1.0 - sigmoid))
        return tl.where(inside, normal, 0.0), dz

    @triton.jit
    def _gradient_sums(
        x_ptr, dy_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, sum_ptr, product_ptr, positions, channels, tiles,
        groups, width, R: tl.constexpr, K: tl.constexpr, ACTIVATE: tl.constexpr,
    ):  # fmt: skip
        """Write the sums over a tile, for each channel, of dz and of dz x^."""
        offsets, inside, column, sample, number = _place(positions, channels, tiles, R, K)
        weight, bias, mean, rstd = _statistics(
            weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, sample, channels, groups, width
        )
        normal, dz = _pulled(x_ptr, dy_ptr, offsets, inside, weight, bias, mean, rstd, ACTIVATE)
        tl.store(sum_ptr + number * channels + column, tl.sum(dz, 0), mask=column < channels)
        tl.store(product_ptr + number * channels + column, tl.sum(dz * normal, 0), mask=column < channels)

    @triton.jit
    def _gradient(
        x_ptr, dy_ptr, dx_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, average_ptr, product_ptr, positions, channels,
        tiles, groups, width, R: tl.constexpr, K: tl.constexpr, ACTIVATE: tl.constexpr,
    ):  # fmt: skip
        """Write the gradient by the tile, given the averages over groups of w dz and of w dz x^."""
        offsets, inside, column, sample, _ = _place(positions, channels, tiles, R, K)
        weight, bias, mean, rstd = _statistics(
            weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, sample, channels, groups, width
        )
        normal, dz = _pulled(x_ptr, dy_ptr, offsets, inside, weight, bias, mean, rstd, ACTIVATE)
        group = sample * groups + column // width
        average = tl.load(average_ptr + group, mask=column < channels, other=0.0)
        product = tl.load(product_ptr + group, mask=column < channels, other=0.0)
        dx = rstd[None, :] * (weight[None, :] * dz - average[None, :] - normal * product[None, :])
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
