"""Layouts as a condition: boxes become tokens, which the paper's transformer encodes (section 4.3.1, Table 17).

Legend: B batch, N objects, L tokens of a layout (the published model: 30 objects of 3 tokens, 2 of the crop), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.aliases import Batch
from ldm.bounds import Depth, Fraction, NonNegative, Size
from ldm.conditioning.base import Conditioner, InputSpec
from ldm.errors import UserError
from ldm.networks.transformer import TransformerEncoder
from ldm.transfer import sent

__all__ = ["LayoutConditioner", "LayoutTokenizer", "LayoutValue"]


class LayoutTokenizer(Protocol):
    """What LayoutConditioner needs of a tokenizer, such as those of ldm.data.layout.boxes."""

    vocab_size: int
    encode_crop: bool

    @property
    def length(self) -> int:
        """Return L."""

    @property
    def none_token(self) -> int:
        """Return the token of absent objects."""

    @property
    def num_labels(self) -> int:
        """Return the number of labels that objects can have."""

    def tokens(
        self, labels: Sequence[int], boxes: Sequence[Sequence[float]], crop: Sequence[float] | None = None
    ) -> list[int]:
        """Return one layout as L ids. UserError if it does not fit."""


class LayoutValue(NamedTuple):
    """A batch of layouts: boxes (B, N, 4), labels (B, N) with -1 = absent, crops (B, 4) or None for full images."""

    boxes: Tensor
    labels: Tensor
    crops: Tensor | None = None


class LayoutConditioner(Conditioner):
    """Encode boxes with their labels by a trainable transformer: context (B, L, D).

    'No condition' is the token of absent objects everywhere. UserError for layouts that the tokenizer refuses.

    Args:
        key: boxes (B, N, 4) as left, top, width, height in [0, 1].
        labels_key: labels (B, N), -1 for absent objects.
        crop_key: crops (B, 4), if the tokenizer encodes crops; a batch without them has full images.
        embedding_std: see TransformerEncoder.
    """

    def __init__(
        self,
        tokenizer: LayoutTokenizer,
        dim: Size,
        depth: Depth,
        key: str = "boxes",
        labels_key: str = "box_labels",
        crop_key: str = "crop",
        drop_rate: Fraction = 0.0,
        embedding_dropout: Fraction = 0.0,
        embedding_std: NonNegative = 0.02,
        trainable: bool = True,
    ) -> None:
        super().__init__(key, "context", drop_rate, trainable)
        self.tokenizer, self.labels_key, self.crop_key = tokenizer, labels_key, crop_key
        self.width = dim
        self.transformer = TransformerEncoder(
            tokenizer.vocab_size,
            tokenizer.length,
            dim,
            depth,
            embedding_dropout=embedding_dropout,
            embedding_std=embedding_std,
        )
        self._freeze_unless_trainable()

    def value(self, batch: Batch) -> LayoutValue:
        """Return boxes, labels, and the crops if the batch has any."""
        boxes, labels = self._entry(batch, self.key), self._entry(batch, self.labels_key)
        crops = batch.get(self.crop_key)
        if crops is not None and not self.tokenizer.encode_crop:
            raise UserError(
                f"LayoutConditioner: the batch has '{self.crop_key}', so its boxes are of whole images; "
                "set encode_crop: true in the tokenizer, or whole: false in the data set"
            )
        return LayoutValue(boxes, labels, crops)

    def input_specs(self) -> dict[str, InputSpec]:
        """Return that labels are those of the tokenizer."""
        return {self.labels_key: InputSpec(self.tokenizer.num_labels)}

    def ids(self, value: LayoutValue) -> Tensor:
        """Return the tokens of layouts: int64 (B, L) on the device of this module."""
        crops = [None] * len(value.labels) if value.crops is None else value.crops.tolist()
        rows = zip(value.labels.tolist(), value.boxes.tolist(), crops, strict=True)
        return sent(torch.tensor([self.tokenizer.tokens(*row) for row in rows]), self.device)

    def embed(self, value: LayoutValue) -> Tensor:
        """Return encoded layouts: (B, L, D)."""
        return self.transformer(self.ids(value))

    def null(self, n: int) -> Tensor:
        """Return the layout of absent objects, encoded once: (n, L, D)."""
        return self.transformer(self._null_ids()).expand(n, -1, -1)

    def embed_dropped(self, value: LayoutValue, drop: Tensor) -> Tensor:
        """Return encoded layouts, that of absent objects for the dropped samples."""
        return self.transformer(torch.where(sent(drop, self.device)[:, None], self._null_ids(), self.ids(value)))

    def _null_ids(self) -> Tensor:
        return torch.full((1, self.tokenizer.length), self.tokenizer.none_token, device=self.device)
