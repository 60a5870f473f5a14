"""Encoder outputs kept in memory, so that the frozen first stage sees the training set once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import UserError

__all__ = ["CachedLatents"]


class CachedLatents(Dataset):
    """Serve item i as {"moments": moments[i], **entries[i]}.

    moments (N, C, h, w) are what the encoder gave before its regulariser, so that a KL posterior is still sampled anew;
    entries are whatever else the items had. Several views of a picture (crops, flips) are simply several items.
    """

    def __init__(self, moments: Tensor, entries: Sequence[Mapping[str, Any]]) -> None:
        if len(moments) != len(entries):
            raise UserError(f"CachedLatents: {len(moments)} latents do not go with {len(entries)} entries")
        self.moments, self.entries = moments, entries

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"moments": self.moments[index], **self.entries[index]}

    @classmethod
    def of_batches(cls, batches: Sequence[Mapping[str, Any]]) -> CachedLatents:
        """Take batches apart that hold "moments" and further entries, each of them a tensor or a list."""
        moments = torch.cat([batch["moments"] for batch in batches])
        entries = [
            {key: value[row] for key, value in batch.items() if key != "moments"}
            for batch in batches
            for row in range(len(batch["moments"]))
        ]
        return cls(moments, entries)
