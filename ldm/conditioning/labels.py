"""Class labels as a condition: one token of cross-attention (section 4.3.2), or the label itself for the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.bounds import Fraction, Natural, Size
from ldm.conditioning.base import Conditioner, InputSpec, Slot
from ldm.errors import UserError
from ldm.transfer import sent


class ClassConditioner(Conditioner):
    """Embed labels (B,) as a token (B, 1, D); with slot 'vector' the backbone embeds them itself.

    num_classes counts the rows of the table, the null label included (the published ImageNet model: 1001, null 1000);
    null_label "zeros": 'no class' is zeros, with embed_dim.
    UserError if the null label is outside the table or missing where drop_rate needs it, and for labels outside the
    table, if they are on the CPU.
    """

    def __init__(
        self,
        num_classes: Size = 1000,
        embed_dim: Size | None = None,
        key: str = "class_label",
        null_label: Natural | Literal["zeros"] | None = None,
        drop_rate: Fraction = 0.0,
        slot: Slot = "context",
        trainable: bool = True,
    ) -> None:
        super().__init__(key, slot, drop_rate, trainable)
        if slot == "concat":
            raise UserError("ClassConditioner: a label cannot be concatenated to an image; use slot context or vector")
        if null_label == "zeros" and embed_dim is None:
            raise UserError("ClassConditioner: null_label zeros needs embed_dim; a label has no zeros")
        if isinstance(null_label, int) and not 0 <= null_label < num_classes:
            raise UserError(
                f"ClassConditioner: null_label is {null_label}; num_classes={num_classes} allows 0 to {num_classes - 1}"
            )
        if drop_rate > 0 and null_label is None:
            raise UserError("ClassConditioner: drop_rate needs null_label, the class that means 'no class'")
        if (embed_dim is None) == (slot == "context"):
            raise UserError("ClassConditioner: give embed_dim with slot context, and only with it")
        self.num_classes = num_classes
        self.width = num_classes if embed_dim is None else embed_dim
        self.null_label = null_label
        if embed_dim is not None:
            self.embedding = nn.Embedding(num_classes, embed_dim)
        self._freeze_unless_trainable()

    def embed(self, value: Tensor | Sequence[int]) -> Tensor:
        """Return embedded labels (B, 1, D), or with slot 'vector' the labels (B,)."""
        labels = self._labels(value)
        return labels if self.slot == "vector" else self.embedding(labels[:, None])

    def input_specs(self) -> dict[str, InputSpec]:
        """Return that data have labels of the table, except the null label."""
        return {self.key: InputSpec(self.num_classes, self.null_label if self.null_label != "zeros" else None)}

    def null(self, n: int) -> Tensor:
        """Return the null label n times, embedded. UserError if there is none."""
        if self.null_label == "zeros":
            return self.embedding.weight.new_zeros(n, 1, self.width)
        return self.embed(torch.full((n,), self._null_label()))

    def check_null(self) -> None:
        """Raise UserError if no label is the null label."""
        if self.null_label is None:
            raise UserError(
                "ClassConditioner: without null_label there is nothing to guide away from; set it, or use scale 1"
            )

    def embed_dropped(self, value: Tensor | Sequence[int], drop: Tensor) -> Tensor:
        """Return embedded labels, the null label for the dropped ones."""
        if self.null_label == "zeros":
            return super().embed_dropped(value, drop)
        labels = self._labels(value)
        if drop.any():
            labels = labels.masked_fill(sent(drop, self.device), self._null_label())
        return self.embed(labels)

    def _labels(self, value: Tensor | Sequence[int]) -> Tensor:
        """Return labels on this device; only those from the CPU are checked, for others one would have to wait."""
        labels = torch.as_tensor(value, dtype=torch.long).reshape(-1)
        if labels.device.type == "cpu" and len(labels):
            for label in (int(labels.min()), int(labels.max())):
                if not 0 <= label < self.num_classes:
                    raise UserError(
                        f"ClassConditioner: the label {label} under '{self.key}', but num_classes={self.num_classes} "
                        f"allows 0 to {self.num_classes - 1}; raise num_classes, or correct the labels"
                    )
        return sent(labels, self.device)

    def _null_label(self) -> int:
        self.check_null()
        return self.null_label
