"""Compilation by repeated block: each is compiled once for all blocks of its shape, which starts in seconds.

The rest stays eager: so the balance of the adversarial loss goes back through the last convolution alone, where a
compiled decoder would go back through all of itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

_SHAPES = 256  # of blocks that are compiled in one process; torch gives up at 8
# Not those with CUDA graphs: each call of a block would begin a new generation, and overwrite what the one before made.
Mode = Literal["default", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class Compilation:
    """How networks are compiled: torch's mode; whether for shapes that change (null: once they do)."""

    mode: Mode = "default"
    dynamic: bool | None = False

    def apply(self, networks: Iterable[nn.Module]) -> None:
        """Compile the blocks of networks, and networks without blocks as a whole, when they are first called."""
        torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
        for network in networks:
            for block in regions(network):
                block.compile(mode=self.mode, dynamic=self.dynamic)


def regions(network: nn.Module) -> list[Any]:
    """Return what of a network is compiled on its own: its blocks, or itself."""
    return list(getattr(network, "blocks", ())) or [network]
