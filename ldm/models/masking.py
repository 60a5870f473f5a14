"""What a model of images with holes is given: the conditioner that takes the mask, and the part that is known."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.conditioning.images import FirstStageConditioner, InpaintingConditioner
from ldm.data.core.pixels import from_bytes
from ldm.data.readers.single_images import padded
from ldm.errors import UserError
from ldm.models.loading import LoadedModel

Masking = FirstStageConditioner | InpaintingConditioner
_NEEDED = "inpainting needs a conditioner with a mask_key, or a model of texts alone or without condition"


def mask_conditioner(loaded: LoadedModel) -> Masking | None:
    """Return the conditioner that takes the mask; None for a model that was not trained to fill holes.

    UserError for a model of other conditions than images with masks, texts, and sizes.
    """
    known, texts = list(loaded.model.conditioners()), loaded.text_keys()
    masking = [part for part in known if isinstance(part, Masking) and part.mask_key is not None]
    others = [part for part in known if part.key not in texts and part.entry_for((1, 1)) is None]
    if others != masking or len(masking) > 1:
        found = ", ".join(f"{type(part).__name__} of '{part.key}'" for part in known)
        raise UserError(f"{loaded.config}: this model is conditioned on {found}; {_NEEDED}")
    return next(iter(masking), None)


def known_part(image: Tensor, hole: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image of bytes (C, H, W) with a hole, bool (1, H, W), as models see it: whole, mask, with a black hole.

    The mask is 1 in the hole and -1 elsewhere. Sides that `multiple` does not divide are filled up by repetition.
    """
    x, mask = padded(from_bytes(image), multiple), padded(hole.float() * 2 - 1, multiple)
    return x, mask, torch.where(mask > 0, torch.tensor(-1.0), x)
