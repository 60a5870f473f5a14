"""The meta device: modules that are made there have names and shapes, and neither memory nor values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def is_asked_for() -> bool:
    """Return whether modules are made on the meta device, inside `with torch.device("meta")`."""
    return torch.get_default_device().type == "meta"


def without_values() -> AbstractContextManager:
    """Make modules without computing initial values where there is nowhere to put them, which takes half the time."""
    return _Unset() if is_asked_for() else nullcontext()


class _Unset(TorchFunctionMode):
    """Leave tensors as they are where `torch.nn.init` would fill them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == torch.nn.init.__name__:
            return kwargs["tensor"]
        return func(*args, **kwargs)
