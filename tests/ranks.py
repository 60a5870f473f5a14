"""Ranks of a distributed run without processes, for what only asks who it is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """Be one rank of several inside a block, by torch's backend that communicates with nobody."""
    if world == 1:
        yield
        return
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
