"""Copies to a device that nothing waits for; a leaf module that every layer may import."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device.

    To CUDA it goes by way of pinned memory: from any other the copy begins when all work before it is done, and the
    caller waits for it. torch gives the pinned memory to others once the copy is made.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
