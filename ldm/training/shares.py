"""What each of several devices holds of a training, by strategy, counted from the tensors that are shared out.

ddp     everything; the buckets through which gradients are exchanged last
zero1   as ddp, but of the optimiser's state only that of its own parameters
fsdp    rows of every trained parameter, its gradient, average and state, and for a while the blocks that are at work

Counted is the device that holds most: ZeRO gives parameters out from the largest to the smallest, each to the rank with
the fewest; FSDP2 cuts first axes into equal parts, the last ones of which may be short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ldm.training.module import TrainingModule
from ldm.training.strategies import check_shardable, sharded_blocks

Bytes = Callable[[Tensor], int]


class Held(NamedTuple):
    """Bytes that last on a device while it trains."""

    weights: int
    gradients: int
    optimizer: int
    averages: int


@dataclass(frozen=True)
class Sharing:
    """How many devices share a training, and by which strategy."""

    devices: int = 1
    strategy: str = "ddp"

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients last from step to step."""
        return self.devices > 1

    def __str__(self) -> str:
        return "" if self.devices == 1 else f" ({self.strategy} on {self.devices})"

    @classmethod
    def of(cls, strategy: str | Mapping[str, Any], devices: int) -> Sharing:
        """Return how a strategy shares, given by its name or by a node that builds it; what is unknown is ddp."""
        name = strategy if isinstance(strategy, str) else str(strategy.get("target"))
        known = {"fsdp": ("fsdp", "FullySharded"), "zero1": ("zero1", "ZeroRedundancy")}
        return cls(devices, next((short for short, ends in known.items() if name.endswith(ends)), "ddp"))

    def held(self, training: TrainingModule, optimizer: Optimizer, gradients: Iterable[Tensor]) -> Held:
        """Return what lasts on the device that holds most. UserError for a training that cannot be shared so."""
        part = _whole
        if self.strategy == "fsdp":
            check_shardable(training)
            part = self._rows
        averages = [buffer for average in training.all_averages() for buffer in average.buffers()]
        trained = [parameter for parameter in training.parameters() if parameter.requires_grad]
        kept = [parameter for parameter in training.parameters() if not parameter.requires_grad]
        buffers = sum(map(_whole, training.buffers())) - sum(map(_whole, averages))
        weights = sum(map(part, trained)) + sum(map(_whole, kept)) + buffers
        optimised = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = {parameter: _tensors(optimizer.state[parameter]) for parameter in optimised}
        if self.strategy == "zero1":
            state = max(self._portions(optimizer, {key: sum(map(_whole, value)) for key, value in states.items()}))
        else:
            state = sum(part(tensor) if tensor.shape == key.shape else _whole(tensor)
                        for key, tensors in states.items() for tensor in tensors)  # fmt: skip
        return Held(weights, sum(map(part, gradients)), state, sum(map(part, averages)))

    def gathered(self, training: TrainingModule) -> int:
        """Return the most bytes, whole weights and gradients, that come to the rows while blocks are at work.

        While a block goes back, its weights and the block's before are there, its gradients, and the buffers through
        which both are exchanged; what is in no block is there all the time.
        """
        if self.strategy != "fsdp" or self.devices == 1:
            return 0
        sizes = [_trained(block.parameters()) for block in sharded_blocks(training)]
        largest = max((2 * one + 2 * other for one, other in zip(sizes, sizes[1:] + sizes[:1], strict=True)), default=0)
        return _trained(training.parameters()) - sum(sizes) + largest + max(sizes, default=0)

    def _rows(self, tensor: Tensor) -> int:
        """Return the bytes of the first rank's part."""
        if tensor.dim() == 0 or tensor.numel() == 0:
            return _whole(tensor)
        return -(-len(tensor) // self.devices) * _whole(tensor) // len(tensor)

    def _portions(self, optimizer: Optimizer, states: dict[Any, int]) -> list[int]:
        """Return the bytes of state that each rank gets from torch's ZeroRedundancyOptimizer."""
        numbers, portions = [0] * self.devices, [0] * self.devices
        for group in optimizer.param_groups:
            for parameter in sorted(group["params"], key=Tensor.numel, reverse=True):
                rank = numbers.index(min(numbers))
                numbers[rank] += parameter.numel()
                portions[rank] += states[parameter]
        return portions


def _whole(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _trained(parameters: Iterable[Tensor]) -> int:
    return sum(_whole(parameter) for parameter in parameters if parameter.requires_grad)


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in tree_leaves(dict(state)) if isinstance(value, Tensor)]
