"""How latents are brought to about unit variance, which diffusion expects (section 3.3 and appendix G).

By one factor, fixed or measured as 1 / std over a few batches before the first step; or by mean and standard deviation
of each channel, given or measured alike, after which the factor scales the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UserError

Sum = Callable[[Tensor], Tensor]  # over all ranks


@dataclass(frozen=True)
class LatentScale:
    """Origin of the factor: a positive number, or "measure" over `num_batches` batches of every rank.

    mean, std: of each channel of the latents, subtracted and divided by before the factor; per_channel: with "measure",
    measure these instead of the factor. UserError for what is no scale, and for one of mean and std alone.
    """

    value: float | str = 1.0
    num_batches: int = 4
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    per_channel: bool = False

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise UserError(f"latent_scale: num_batches is {self.num_batches}; it must be at least 1")
        if not self.is_measured and (isinstance(self.value, str) or self.value <= 0):
            raise UserError(f"latent_scale: '{self.value}' is neither a positive number nor 'measure'")
        if (self.mean is None) != (self.std is None):
            raise UserError("latent_scale: mean and std belong together, a number for each channel; give both")
        if self.mean is not None and (len(self.mean) != len(self.std) or min(self.std, default=0) <= 0):
            raise UserError("latent_scale: mean and std need a number for each channel, those of std above 0")
        if self.is_measured and self.mean is not None:
            raise UserError("latent_scale: mean and std are given, but value is 'measure'; leave one of them out")
        if self.per_channel and not self.is_measured:
            raise UserError("latent_scale: per_channel measures mean and std; it needs value: measure")

    @property
    def is_measured(self) -> bool:
        """Return whether it is measured from data."""
        return self.value == "measure"

    @property
    def has_channels(self) -> bool:
        """Return whether each channel has a mean and a standard deviation."""
        return self.per_channel or self.mean is not None

    def channels(self, count: int) -> tuple[Tensor, Tensor]:
        """Return mean and std (c, 1, 1) to begin with. UserError unless they are for `count` channels."""
        if self.mean is None:
            return torch.zeros(count, 1, 1), torch.ones(count, 1, 1)
        if len(self.mean) != count:
            raise UserError(f"latent_scale: mean and std have {len(self.mean)} channels, but the latents have {count}")
        return torch.tensor(self.mean).float()[:, None, None], torch.tensor(self.std).float()[:, None, None]

    @classmethod
    def of(cls, value: LatentScale | float | str) -> LatentScale:
        """Accept a bare number or the word "measure" in place of the object."""
        return value if isinstance(value, cls) else cls(value)


def unit_variance_scale(latents: Iterable[Tensor], sum_over_ranks: Sum | None = None) -> Tensor:
    """Return 1 / std (unbiased, float32 scalar) over all entries of all latents and, if summed, of all ranks.

    Samples that are not finite are left out, as training leaves them out. UserError if nothing varies.
    """
    _, variance = _moments(_sums(latents, sum_over_ranks).sum(1))
    return variance.rsqrt().float()


def channel_moments(latents: Iterable[Tensor], sum_over_ranks: Sum | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and std (float32 (c, 1, 1)) of each channel, in the same way."""
    mean, variance = _moments(_sums(latents, sum_over_ranks))
    return mean.float()[:, None, None], variance.sqrt().float()[:, None, None]


def scale_and_moments(latents: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return `unit_variance_scale` and `channel_moments` of latents that can be had once."""
    sums = _sums(latents, None)
    mean, variance = _moments(sums)
    return _moments(sums.sum(1))[1].rsqrt().float(), mean.float(), variance.sqrt().float()


def _sums(latents: Iterable[Tensor], sum_over_ranks: Sum | None) -> Tensor:
    """Return sum, sum of squares and count of each channel, float64 (3, c)."""
    sums = None
    for z in latents:
        flat = z.detach().cpu().double().flatten(2)  # (B, c, h * w)
        flat = flat[flat.isfinite().all(2).all(1)].transpose(0, 1).flatten(1)  # (c, B * h * w)
        batch = torch.stack([flat.sum(1), flat.square().sum(1), flat.new_full((len(flat),), flat.shape[1])])
        sums = batch if sums is None else sums + batch
    if sums is None:
        raise UserError("latent_scale: there is no batch to measure; the training set is empty")
    return sums if sum_over_ranks is None else sum_over_ranks(sums)


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance from sums (3, ...)."""
    total, total_square, count = sums
    variance = (total_square - total.square() / count) / (count - 1)
    if not torch.isfinite(variance).all() or (variance <= 0).any():
        raise UserError(f"latent_scale: the variance of the latents is {variance.tolist()}; check first stage and data")
    return total / count, variance
