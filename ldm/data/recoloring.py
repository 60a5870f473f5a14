"""Pictures in other colours, for training sets too small to show all that may come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.derived import DerivedDataset
from ldm.errors import UserError

__all__ = ["Recolored"]


class Recolored(DerivedDataset):
    """Give the items of any map-style data set of pictures with channels exchanged, and contrast and brightness drawn.

    Each channel c becomes a c' + b, of a channel c' of the picture drawn without replacement, a from [1 - strength, 1],
    b so that the result stays in [-1, 1]. Raises UserError for a strength outside [0, 1).
    """

    stream = 4

    def __init__(self, dataset: Dataset, strength: float = 0.3) -> None:
        super().__init__(dataset)
        if not 0 <= strength < 1:
            raise UserError(f"Recolored: strength {strength} must be in [0, 1)")
        self.strength = strength

    def _derive(self, image: Tensor, rng: np.random.Generator) -> Mapping[str, Tensor]:
        channels = len(image)
        order = torch.from_numpy(rng.permutation(channels))
        gain = 1 - self.strength * rng.random(channels)
        offset = (1 - gain) * rng.uniform(-1, 1, channels)
        gain, offset = (torch.from_numpy(value).float()[:, None, None] for value in (gain, offset))
        return {"image": image[order] * gain + offset}
