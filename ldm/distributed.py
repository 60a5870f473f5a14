"""Rank and number of the processes that train together."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.distributed as dist

__all__ = ["is_first_process", "rank", "world_size"]

_RANKS = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


def rank() -> int:
    """Return the number of this process in its process group, from 0; 0 outside of one."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 outside of a process group."""
    return dist.get_world_size() if _is_initialized() else 1


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process will be rank 0, by what a launcher or Lightning put into the environment."""
    names = ("RANK",) if "RANK" in environment else _RANKS
    return all(environment.get(name, "0") == "0" for name in names)


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
