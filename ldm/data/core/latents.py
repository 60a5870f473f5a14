"""Encoder outputs kept in memory, so that the frozen first stage encodes the training set only once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import UserError

__all__ = ["CachedLatents"]


class CachedLatents(Dataset):
    """Data set with the items {"moments": moments[i], **entries[i]}.

    moments (N, C, h, w): outputs of the encoder before its regulariser, so that a KL posterior is still sampled every
    time. entries: the other keys of the items. Several crops or flips of one image are several items.
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
        """Make the data set of the rows of batches: "moments", and other keys that are tensors or lists."""
        moments = torch.cat([batch["moments"] for batch in batches])
        entries = [
            {key: value[row] for key, value in batch.items() if key != "moments"}
            for batch in batches
            for row in range(len(batch["moments"]))
        ]
        return cls(moments, entries)
