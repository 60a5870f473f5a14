"""What the tests of the networks share."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same random inputs in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def interpreted_copy() -> Iterator[Callable[[ModuleType], ModuleType]]:
    """Copy a module with a copy of Triton, whose kernels are interpreted from their definition on."""
    pytest.importorskip("triton")
    own = {name: module for name, module in sys.modules.items() if f"{name}.".startswith("triton.")}
    kept = {name: module for name, module in own.items() if name.startswith("triton._C")}  # compiled, loaded once

    def copy(module: ModuleType) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"interpreted_{module.__name__}", module.__file__)
        copied = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copied)
        return copied

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in own.keys() - kept.keys():
            del sys.modules[name]
        try:
            yield copy
        finally:
            for name in [name for name in sys.modules if f"{name}.".startswith("triton.") and name not in kept]:
                del sys.modules[name]
            sys.modules.update(own)


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter a random value, so that zero-initialised branches take part; evaluation mode."""

    def apply(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
        return module.eval()

    return apply
