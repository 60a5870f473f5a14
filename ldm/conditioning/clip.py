"""Embeddings of images and texts by CLIP (Radford et al. 2021), of L2 norm 1, in one common space.

Retrieval-augmented models are conditioned on them (Blattmann et al. 2022). Weights are read from a local folder or the
local Hugging Face cache at the first use; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.tokenizers import HuggingFaceTokenizer, load_pretrained
from ldm.errors import UserError
from ldm.transfer import sent

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on, in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEmbedder:
    """Embed images and texts; each of the two models is read at its first use.

    version: a local folder, or a name in the Hugging Face cache; UserError at the first use if it is in neither.
    """

    def __init__(self, version: str = DEFAULT_CLIP, device: torch.device | str = "cpu") -> None:
        self.version = version
        self.device = torch.device(device)
        self._models: dict[str, Any] = {}

    @property
    def image_model(self) -> nn.Module:
        """Return the image model."""
        return self._model("CLIPVisionModelWithProjection", "image model")

    @property
    def text_model(self) -> nn.Module:
        """Return the text model."""
        return self._model("CLIPTextModelWithProjection", "text model")

    @torch.no_grad()
    def embed_images(self, images: Sequence[Tensor]) -> Tensor:
        """Return embeddings (N, D) of images (3, H, W) in [-1, 1] of any sizes, each cropped to its central square."""
        return self.embed_squares(torch.stack([self.square(image) for image in images]))

    def square(self, image: Tensor) -> Tensor:
        """Return the input of the model for an image (3, H, W): its central square, scaled to (3, S, S).

        UserError unless the image has 3 channels.
        """
        return _centre_square(image, self.image_model.config.image_size)

    @torch.no_grad()
    def embed_squares(self, squares: Tensor) -> Tensor:
        """Return embeddings (N, D) of squares (N, 3, S, S) made by `square`."""
        pixels = normalised(sent(squares, self.device), CLIP_MEAN, CLIP_STD)
        return F.normalize(self.image_model(pixel_values=pixels).image_embeds, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings of texts: (N, D)."""
        model = self.text_model
        tokenizer = self._models.get("tokenizer")
        if tokenizer is None:
            config = model.config
            tokenizer = HuggingFaceTokenizer(self.version, config.max_position_embeddings, config.vocab_size)
            self._models["tokenizer"] = tokenizer
        ids = sent(tokenizer(texts), self.device)
        return F.normalize(model(input_ids=ids).text_embeds, dim=-1)

    def _model(self, kind: str, what: str) -> Any:
        if kind not in self._models:
            model = load_pretrained(kind, self.version, f"CLIP {what}", hub=DEFAULT_CLIP)
            self._models[kind] = model.eval().to(self.device)
        return self._models[kind]


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] as a network takes them that was trained on such values in [0, 1]."""
    centre, width = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return ((images + 1) / 2 - centre) / width


def _centre_square(image: Tensor, side: int) -> Tensor:
    """Return the largest square at the centre, scaled to (3, side, side)."""
    if len(image) != 3:
        raise UserError(f"CLIP: needs images of 3 channels, not {len(image)}")
    edge = min(image.shape[1:])
    top, left = (image.shape[1] - edge) // 2, (image.shape[2] - edge) // 2
    square = image[None, :, top : top + edge, left : left + edge]
    return F.interpolate(square, (side, side), mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)
