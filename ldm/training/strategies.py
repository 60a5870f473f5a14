"""How several processes share one training: Lightning's strategies with the settings that our modules rely on.

ddp      every rank holds everything; gradients are averaged
zero1    as ddp, but each rank keeps the optimiser state of its share of the parameters only (ZeRO stage 1)
fsdp     each rank keeps a shard of every trained parameter, gradient, average and optimiser state (FSDP2)

All three write the checkpoint that one process would write, and go on from one written by any of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.errors import UserError
from ldm.networks.backbone import Backbone
from ldm.networks.transformer import TransformerLayers
from ldm.training.latent_diffusion import DiffusionTraining

# No broadcast of buffers: the averages are buffers, equal on all ranks anyway, and cost as much as the weights.
_DDP = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "find_unused_parameters": False}
_STEPS = ("training_step", "validation_step", "test_step")


class ZeroRedundancy(DDPStrategy):
    """Share out the optimiser's state; its scheduler moves over to the sharing optimiser."""

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Replace each optimiser by one of the same kind that keeps this rank's share of the state."""
        super().setup_optimizers(trainer)
        shared = [_shared(optimizer) for optimizer in self.optimizers]
        for config in self.lr_scheduler_configs:
            scheduler = config.scheduler
            if not isinstance(scheduler, LambdaLR):
                raise UserError(f"--strategy zero1: {type(scheduler).__name__} cannot be moved; use ddp")
            position = next(i for i, optimizer in enumerate(self.optimizers) if optimizer is scheduler.optimizer)
            config.scheduler = LambdaLR(shared[position], scheduler.lr_lambdas)
        self.optimizers = shared


def _shared(optimizer: Optimizer) -> ZeroRedundancyOptimizer:
    known = inspect.signature(type(optimizer)).parameters  # defaults also hold what AdamW tells its parent class
    settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    return ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer), **settings)


class FullySharded(ModelParallelStrategy):
    """Shard what a latent diffusion model trains over all ranks: each block of the networks is gathered when it runs.

    The frozen first stage stays whole on every rank. So is everything during an evaluation, which then needs no
    communication and may differ in length between ranks, and while rank 0 draws pictures.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self._evaluation, self._is_whole = ExitStack(), False

    def setup_environment(self) -> None:
        """Make one data-parallel group of all ranks."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Bring the model to the device, make it equal on all ranks, shard it, and then build the optimiser."""
        check_shardable(self.model)
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            torch.distributed.broadcast(tensor.detach(), src=0)
        shard(self.model, self.device_mesh["data_parallel"])
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    # --- evaluation ------------------------------------------------------------------------------------------------

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Run a block, without gradients, with all weights and averages whole on every rank; all ranks take part."""
        if self._is_whole:
            yield
            return
        averages, modules = self.lightning_module.all_averages(), _sharded_modules(self.lightning_module)
        shards = [(average, dict(average.named_buffers())) for average in averages]
        self._is_whole = True
        try:
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            for average, shadows in shards:
                for name, shadow in shadows.items():
                    setattr(average, name, _whole(shadow))
            yield
        finally:
            for average, shadows in shards:
                for name, shadow in shadows.items():
                    setattr(average, name, shadow)
            for module in modules:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()
            self._is_whole = False

    def on_validation_start(self) -> None:
        """Gather everything for a validation."""
        self._evaluation.enter_context(self.whole())

    def on_validation_end(self) -> None:
        """Go back to shards."""
        self._evaluation.close()

    def on_test_start(self) -> None:
        """Gather everything for a test."""
        self._evaluation.enter_context(self.whole())

    def on_test_end(self) -> None:
        """Go back to shards."""
        self._evaluation.close()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Load optimisers the usual way, from the state that one process would have."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the weights on rank 0, tensor by tensor; all ranks take part."""
        state = {name: self._gathered(value) for name, value in self.lightning_module.state_dict().items()}
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gather the state of an optimiser on rank 0; all ranks take part."""
        optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = _mapped(optimizer.state_dict(), self._gathered)
        return state if self.is_global_zero else {}

    def _gathered(self, value: Tensor) -> Tensor | None:
        value = _whole(value)
        return value.cpu() if self.is_global_zero else None

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the one file on every rank."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's shards out of whole weights."""
        present = self.lightning_module.state_dict()
        state = {
            name: _like(value, present[name]) if name in present else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's shards out of the whole state of the optimisers."""
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict({**whole, "state": _state_like(whole["state"], optimizer)})


def shard(module: DiffusionTraining, mesh: Any) -> None:
    """Shard the trained parameters of a model over a mesh, block by block, and its averages in the same way."""
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    blocks = sharded_blocks(module)
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    # By itself FSDP prefetches what ran before in this process; after an evaluation that is not the same on all ranks.
    for part, before in zip((*blocks, module), (module, *blocks), strict=True):
        part.set_modules_to_backward_prefetch([before])
    for name in _STEPS:
        register_fsdp_forward_method(module, name)
    for average in module.all_averages():
        average.shard_like(module.averaged)


def check_shardable(module: nn.Module) -> None:
    """Raise UserError for the training of anything but a latent diffusion model."""
    if not isinstance(module, DiffusionTraining):
        raise UserError(f"--strategy fsdp: {type(module).__name__} cannot be sharded; use ddp or zero1")


def sharded_blocks(module: DiffusionTraining) -> list[nn.Module]:
    """Return the blocks that are gathered on their own, in their order of use."""
    return [*_blocks(module.model.cond_stage_model or nn.Identity()), *_blocks(module.model.model)]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        blocks = part.blocks if isinstance(part, (Backbone, TransformerLayers)) else ()
        yield from (block for block in blocks if any(p.requires_grad for p in block.parameters()))


def _sharded_modules(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Tensor, reference: Tensor) -> Tensor:
    """Cut a tensor that every rank holds as the reference is cut; what has another shape (a count) stays whole."""
    if not isinstance(reference, DTensor) or value.shape != reference.shape:
        return value
    return distribute_tensor(value, reference.device_mesh, reference.placements, src_data_rank=None)


def _state_like(state: Mapping[int, Any], optimizer: Optimizer) -> dict[int, Any]:
    """Cut the state of every parameter, which the optimiser numbers in its order, as the parameter is cut."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {}
    for index, values in state.items():
        cut[index] = _mapped(values, partial(_like, reference=parameters[index]))
    return cut


def _mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Change the tensors in nested dicts and lists, in their order."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": lambda: DDPStrategy(**_DDP),
    "zero1": lambda: ZeroRedundancy(**_DDP),
    "fsdp": FullySharded,
}


def local_part(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter."""
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def whole_weights(trainer: pl.Trainer) -> AbstractContextManager[None]:
    """Gather sharded weights for what one rank does alone; every rank must enter. Else do nothing."""
    return trainer.strategy.whole() if isinstance(trainer.strategy, FullySharded) else nullcontext()
