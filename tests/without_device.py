"""What would wait for a CUDA device, found on tensors without data that say they lie on one."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.networks.fused_norm import counted_as_on_cuda

_OF_UNKNOWN_SIZE = ("nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount")


class Waits(TorchDispatchMode):
    """Note where values are read from the device, and what is copied to or from it with a pause.

    Numbers that are read from tensors without data are 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        if name == "_to_copy" and (device := kwargs.get("device")) is not None:
            if torch.device(device).type not in kinds and not kwargs.get("non_blocking"):
                self._note(f"copied from {kinds} to {device}")
        if name == "copy_" and len({tensor.device.type for tensor in tensors[:2]}) == 2 and not (args[2:] and args[2]):
            self._note("copied to another device")
        if "cuda" in kinds and name in _OF_UNKNOWN_SIZE:
            self._note(name)
        if name == "_local_scalar_dense":
            if "cuda" in kinds:
                self._note("a value is read")
            return True if tensors[0].dtype == torch.bool else 1
        return func(*args, **kwargs)

    def _note(self, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/ldm/" in frame.filename]
        self.found.append(f"{what}: {ours[-1].filename}:{ours[-1].lineno}" if ours else what)


@contextmanager
def on_cuda(monkeypatch: pytest.MonkeyPatch, *modules: nn.Module) -> Iterator[Waits]:
    """Move modules to a device that is not there, and watch what is done in the block."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    with FakeTensorMode(allow_non_fake_inputs=True), counted_as_on_cuda():
        for module in modules:
            for part in module.modules():
                part.to_empty(device="cuda", recurse=False)
        with (waits := Waits()):
            yield waits
