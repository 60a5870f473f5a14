"""The factor by which latents are multiplied so that diffusion sees about unit variance (section 3.3 and appendix G).

Either a fixed number, or measured as 1 / std of the latents over a few batches before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UserError


@dataclass(frozen=True)
class LatentScale:
    """Origin of the factor: a positive number, or "measure" over `num_batches` batches of every rank."""

    value: float | str = 1.0
    num_batches: int = 4

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise UserError(f"latent_scale: num_batches is {self.num_batches}; it must be at least 1")
        if not self.is_measured and (isinstance(self.value, str) or self.value <= 0):
            raise UserError(f"latent_scale: '{self.value}' is neither a positive number nor 'measure'")

    @property
    def is_measured(self) -> bool:
        """Return whether the factor is measured from data."""
        return self.value == "measure"

    @classmethod
    def of(cls, value: LatentScale | float | str) -> LatentScale:
        """Accept a bare number or the word "measure" in place of the object."""
        return value if isinstance(value, cls) else cls(value)


def unit_variance_scale(latents: Iterable[Tensor], sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return 1 / std (unbiased, float32 scalar) over all entries of all latents and, if summed, of all ranks.

    Samples that are not finite are left out, as training leaves them out. UserError if nothing varies.
    """
    moments = None
    for z in latents:
        flat = z.detach().cpu().double().flatten(1)  # (B, c * h * w)
        flat = flat[flat.isfinite().all(1)].flatten()
        batch = torch.stack([flat.sum(), flat.square().sum(), flat.new_tensor(flat.numel())])
        moments = batch if moments is None else moments + batch
    if moments is None:
        raise UserError("latent_scale: there is no batch to measure; the training set is empty")
    if sum_over_ranks is not None:
        moments = sum_over_ranks(moments)
    total, total_square, count = moments
    variance = (total_square - total.square() / count) / (count - 1)
    if not torch.isfinite(variance) or variance <= 0:
        raise UserError(f"latent_scale: the variance of the latents is {float(variance)}; check first stage and data")
    return variance.rsqrt().float()
