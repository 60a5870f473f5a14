"""Rank and number of the processes that train together; read from the process group at the time of the call."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["rank", "world_size"]


def rank() -> int:
    """Return the number of this process, from 0; 0 outside of a process group."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 outside of a process group."""
    return dist.get_world_size() if _is_initialized() else 1


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
