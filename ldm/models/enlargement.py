"""The size of the output where the conditioning image is concatenated to the latent."""

from __future__ import annotations

from fractions import Fraction

from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.models.latent_diffusion import LatentDiffusion


def enlargement(model: LatentDiffusion, conditioner: ImageConditioner | SpatialRescaler) -> Fraction:
    """Return the output's side per side of the conditioning image: f m^n, for n scalings by m before the latent."""
    scale = Fraction(model.first_stage_model.factor)
    if isinstance(conditioner, SpatialRescaler):
        scale *= Fraction(conditioner.multiplier).limit_denominator(1000) ** conditioner.num_stages
    return scale


def input_size(size: tuple[int | None, int | None], scale: Fraction) -> tuple[int | None, int | None]:
    """Return the sides of the input that gives an output of `size`; None stays None."""
    return tuple(None if side is None else max(1, round(side / scale)) for side in size)
