"""Count FLOPs and memory while operations run on tensors without data: what lives, and what autograd keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_BLOCK = 512  # bytes in which CUDA's allocator gives memory


class Meter(TorchDispatchMode):
    """Count FLOPs, and the bytes of all storages that live, in blocks as CUDA gives them; `peak`: the most of them."""

    def __init__(self, block: int = _BLOCK) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._block, self._sizes = block, dict[int, int]()

    def hold(self, tensors: Iterable[Any]) -> None:
        """Count what was there before."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        self.hold(tree_leaves(made))
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = self._sizes[key] = -(-storage.nbytes() // self._block) * self._block
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Count the bytes that autograd keeps for the backward pass, each storage once, without those of `others`."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.bytes = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._others | self._storages.keys():
            self._storages[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._storages.clear()
