"""The 1000 classes of ILSVRC 2012 by their WordNet ids, in the order in which models number them: sorted.

The devkit's own numbers (ILSVRC2012_ID) are in another order, which no published model uses.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["SYNSETS"]

SYNSETS: tuple[str, ...] = tuple(Path(__file__).with_suffix(".txt").read_text(encoding="ascii").split())
