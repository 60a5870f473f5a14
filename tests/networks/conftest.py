"""What the tests of the networks share."""

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same random inputs in every run."""
    torch.manual_seed(0)


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
