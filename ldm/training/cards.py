"""Graphics cards by name: their memory, and what they multiply at most, from the data sheets (dense, no sparsity)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldm.errors import UserError

__all__ = ["CARDS", "Card"]


@dataclass(frozen=True)
class Card:
    """A card with its memory in GiB, and its peaks in TFLOP/s, None where they are not known.

    Args:
        half: of bfloat16 and float16, summed in float32.
        tf32: of float32 where float32_matmul_precision is high or medium.
        single: of float32.
    """

    name: str
    memory: float
    half: float | None = None
    tf32: float | None = None
    single: float | None = None

    @classmethod
    def of(cls, text: str) -> Card:
        """Return a card by its name, or one of so many GiB of which nothing else is known. UserError for neither."""
        for name, card in CARDS.items():
            if name == text.upper():
                return card
        try:
            memory = float(text)
        except ValueError:
            memory = 0.0
        if not 0 < memory < math.inf:
            raise UserError(
                f"--card {text}: give the memory of a card in GiB, such as 80, or one of {', '.join(CARDS)}"
            )
        return cls(f"a card of {memory:g} GiB", memory)

    def peak(self, precision: str, matmul: str | None = None) -> float | None:
        """Return what it does at most in a precision of Lightning, such as bf16-mixed, and of float32 products."""
        if "16" in precision:
            return self.half
        return self.tf32 if matmul in ("high", "medium") else self.single


_ALL = (
    Card("A10", 24, 125, 62.5, 31.2),
    Card("A100-40", 40, 312, 156, 19.5),
    Card("A100", 80, 312, 156, 19.5),
    Card("L4", 24, 121, 60, 30.3),
    Card("L40S", 48, 362, 183, 91.6),
    Card("H100", 80, 989, 494, 67),
    Card("H200", 140, 989, 494, 67),
    Card("RTX3090", 24, 71, 35.6, 35.6),
    Card("RTX4090", 24, 165, 82.6, 82.6),
)
CARDS = {card.name: card for card in _ALL}
