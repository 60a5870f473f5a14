"""Metrics that compare samples with what they were conditioned on."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.clip import DEFAULT_CLIP, ClipEmbedder
from ldm.evaluation.extractors import weights_hash
from ldm.evaluation.image_metrics import Batch


class ClipScore:
    """100 max(cos, 0) of image and `caption` in CLIP's space (Hessel et al. 2021, with the scale of torchmetrics)."""

    def __init__(self, version: str = DEFAULT_CLIP, device: torch.device | str = "cpu") -> None:
        self.embedder = ClipEmbedder(version, device)

    @cached_property
    def _hash(self) -> str:
        return weights_hash(self.embedder.image_model, self.embedder.text_model)

    def settings(self) -> dict[str, Any]:
        """Return the SHA-256 of the weights of both models."""
        return {"sha256": self._hash}

    def __call__(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the score of each image (3, H, W) in [-1, 1] with its caption, (B,)."""
        embeddings = self.embedder.embed_images(list(images)), self.embedder.embed_texts(batch["caption"])
        return 100 * (embeddings[0] * embeddings[1]).sum(1).clamp(min=0).cpu()
