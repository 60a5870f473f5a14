"""The kernels of Triton compile, as they are launched, for cards that this machine lacks: wide loads, no spills."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.networks import fused_gate, fused_norm

triton = pytest.importorskip("triton")
CARDS = {80: "A100", 90: "H100", 100: "B200"}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
QUICK = (90, torch.bfloat16)
SOME = [
    pytest.param(*case, id=f"{CARDS[case[0]]}-{DTYPES[case[1]]}", marks=[] if case == QUICK else pytest.mark.slow)
    for case in product(CARDS, DTYPES)
]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int], list[tuple[str, Any]]]]:
    """Compile what is launched for a card, without a launch, and collect it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    found, before = list[tuple[str, Any]](), dict(vars(driver))

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        found.append((kernel.__name__, kernel.run(*arguments, grid=grid, warmup=True, **options)))

    def for_card(card: int) -> list[tuple[str, Any]]:
        target = GPUTarget("cuda", card, 32)
        stand_in = SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: card, get_current_stream=lambda device: 0
        )
        driver.set_active(stand_in)
        return found

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    for module in (fused_norm, fused_gate):
        monkeypatch.setattr(module, "launch", launch)
    yield for_card
    vars(driver).update(before)


@pytest.mark.parametrize(("card", "dtype"), SOME)
def test_every_kernel_compiles_reads_16_bytes_at_once_and_spills_no_register(
    compiled: Callable[[int], list[tuple[str, Any]]], tmp_path: Path, card: int, dtype: torch.dtype
) -> None:
    kernels = compiled(card)
    weight = torch.ones(224, requires_grad=True)
    for activate in (True, False):
        x = torch.randn(2, 224, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        fused_norm.group_norm(x, 32, weight, weight, 1e-5, activate).sum().backward()
    for silu in (True, False):
        halves = torch.randn(3, 2 * 1280, dtype=dtype).requires_grad_()
        fused_gate._Gated.apply(halves, silu, False).sum().backward()
    names = {name for name, _ in kernels}
    assert names == {"_moments", "_merge", "_normalise", "_gradient_sums", "_gradient", "_forward", "_backward"}
    for number, (name, kernel) in enumerate(kernels):
        file = tmp_path / f"{number}.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOL, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        assert re.search(r"STACK:0 .*LOCAL:0 ", usage), f"{name}: {usage}"
        if name != "_merge":  # of a few numbers a group
            assert re.search(r"ld\.global\.v4\.b32", kernel.asm["ptx"]), name
