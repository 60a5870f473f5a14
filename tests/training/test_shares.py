"""What each device is foretold to hold is what torch's strategies leave it: real tensors, and nobody communicates."""

from __future__ import annotations

import math
import weakref
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from fitting import Noise
from ranks import as_rank
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.data.core.loader import collate
from ldm.errors import UserError
from ldm.training.cost import StepCounter, Way, cost_lines
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.shares import Sharing
from ldm.training.strategies import shard

BATCH, DEVICES = 2, 4


def training() -> DiffusionTraining:
    network = tiny.unet(context_dim=tiny.WIDTH, channel_mult=(1, 2))
    conditioner = tiny.ClassConditioner(5, tiny.WIDTH, null_label=3)
    made = tiny.latent_diffusion(network, tiny.autoencoder(), conditioner, averages={"long": 0.1}).train()
    made.setup("fit")
    return made


@cache
def foretold(strategy: str, devices: int = DEVICES) -> Any:
    with torch.device("meta"):
        count = StepCounter(training(), (tiny.SIZE, tiny.SIZE), "32", sharing=Sharing(devices, strategy))
    return count(BATCH)


class Living(TorchDispatchMode):
    """Follow the bytes of storages that live, also of those that are emptied by hand, as FSDP does."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.peak, self._storages = 0, dict[int, weakref.ref[torch.UntypedStorage]]()
        self._hold(held)

    def _hold(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._hold(tree_leaves(made))
        living = {key: storage for key, reference in self._storages.items() if (storage := reference()) is not None}
        self._storages = {key: self._storages[key] for key in living}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in living.values()))
        return made


def local(tensors: list[Any]) -> int:
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in tensors if isinstance(part, Tensor)]
    return sum(part.nbytes for part in parts)


def test_fsdp_leaves_a_device_its_rows_and_needs_no_more_than_foretold() -> None:
    cost = foretold("fsdp")
    with as_rank(0, DEVICES):
        own = training()
        shard(own, init_device_mesh("cpu", (DEVICES,)))
        optimizer = own.configure_optimizers()["optimizer"]
        batch = collate([Noise()[index] for index in range(BATCH)])
        for _ in range(2):  # with the optimiser's state at the second
            held = [*own.parameters(), *own.buffers(), *tree_leaves(list(optimizer.state.values()))]
            living = Living(held)
            optimizer.zero_grad()
            with living:
                own.training_step(batch, 0).backward()
            optimizer.step()
        averages = [buffer for average in own.all_averages() for buffer in average.buffers()]
        assert cost.averages == local(averages)
        assert cost.weights == local([*own.parameters(), *own.buffers()]) - cost.averages
        assert cost.gradients == local([parameter.grad for parameter in own.parameters()])
        assert cost.optimizer == local(tree_leaves([dict(state) for state in optimizer.state.values()]))
    assert living.peak <= cost.peak <= 1.5 * living.peak


@pytest.mark.slow
def test_zero1_gives_each_rank_the_state_of_its_own_parameters() -> None:
    whole, cost = foretold("ddp"), foretold("zero1")
    with as_rank(0, DEVICES):
        own = training()
        parameters = own.optimized_parameters()
        zero = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-3)
        portions = [[p for group in groups for p in group["params"]] for groups in zero._partition_parameters()]
    state = [sum(2 * parameter.nbytes + 4 for parameter in portion) for portion in portions]  # two moments, a count
    assert cost.optimizer == max(state) and sum(state) == whole.optimizer
    assert cost.peak == whole.peak - whole.optimizer + cost.optimizer
    assert (cost.weights, cost.gradients, cost.averages) == (whole.weights, whole.gradients, whole.averages)


def test_one_device_holds_all_and_several_keep_their_gradients() -> None:
    alone, several = foretold("ddp", 1), foretold("ddp")
    assert alone.peak <= several.peak <= alone.peak + alone.gradients
    lasting = several.weights + several.gradients + several.optimizer + several.averages
    assert several.peak > lasting + several.activations


@pytest.mark.parametrize(
    ("given", "strategy"),
    [
        ("auto", "ddp"),
        ("zero1", "zero1"),
        ({"target": "ldm.training.strategies.FullySharded"}, "fsdp"),
        ({"target": "pytorch_lightning.strategies.DDPStrategy"}, "ddp"),
    ],
)
def test_a_strategy_is_known_by_name_or_node(given: str | dict[str, str], strategy: str) -> None:
    assert Sharing.of(given, 8) == Sharing(8, strategy)


@pytest.mark.slow
def test_lines_name_the_strategy_and_what_cannot_be_shared_is_one_line() -> None:
    with torch.device("meta"):
        own, other = training(), tiny.autoencoder_training()
    card = 1.00001  # GiB, on which nothing fits: few counts
    lines = cost_lines(own, 1, None, "32", Way(), card, Sharing(8, "fsdp"))
    (line,) = cost_lines(other, BATCH, None, "32", Way(), 80, Sharing(8, "fsdp"))
    assert "per device (fsdp on 8)" in lines[0]
    assert "not counted" in line and "AutoencoderTraining" in line and len(line) <= 300


def test_rows_of_what_does_not_divide() -> None:
    sharing = Sharing(4, "fsdp")
    for shape in ((5, 3), (2, 3), (1,), ()):
        rows = math.ceil(shape[0] / 4) if shape else 1
        assert sharing._rows(torch.zeros(shape)) == 4 * rows * math.prod(shape[1:])
    with pytest.raises(UserError, match="cannot be sharded"):
        sharing.held(tiny.autoencoder_training(), torch.optim.SGD([torch.zeros(1)]), [])
