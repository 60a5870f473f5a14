"""Normalisation over the batches of all ranks instead of each rank's own, on any backend of torch.distributed.

With W ranks of B/W samples each, statistics, outputs and gradients are those of one rank with all B samples. torch's
SyncBatchNorm refuses tensors that are not on an accelerator. Parameters and buffers have the names of the plain layers,
which compute if there is one rank.
"""

import torch
import torch.distributed as dist
from taming.modules.util import ActNorm
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ldm.distributed import world_size


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors, with gradients; every rank must call this."""
    return _SumOverRanks.apply(x) if world_size() > 1 else x


class _SumOverRanks(torch.autograd.Function):
    """y = sum_r x_r on every rank r, so the gradient of sum_r L_r(y) in x_r is the sum of the ranks' gradients in y."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d by the statistics of all ranks' batches (B, C, H, W), with one exchange of 2C + 1 numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        mean, variance, count = _moments(x)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        mean, scale = mean.to(x.dtype), (variance + self.eps).rsqrt().to(x.dtype) * self.weight
        centred = x - _per_channel(mean)
        return torch.addcmul(_per_channel(self.bias), centred, _per_channel(scale))


class SynchronizedActNorm(ActNorm):
    """ActNorm initialised by the first training batch of all ranks, so that all ranks have equal weights."""

    def initialize(self, input: Tensor) -> None:
        """Set shift and scale so that this batch (B, C, H, W) comes out with mean 0 and standard deviation 1."""
        if world_size() == 1:
            return super().initialize(input)
        with torch.no_grad():
            mean, variance, count = _moments(input)
            std = (variance * (count / (count - 1))).sqrt()
            self.loc.copy_(_per_channel(-mean))
            self.scale.copy_(_per_channel(1 / (std + 1e-6)))


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased variance (C,) and number of values per channel over all ranks, in float64."""
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    mean, variance = mean.double(), variance.double()  # E[x^2] - E[x]^2 in float32 would lose digits
    count = mean.new_full((1,), x.numel() / x.shape[1])
    total = sum_over_ranks(torch.cat([count * mean, count * (variance + mean.square()), count]))
    mean, square = (total[:-1] / total[-1]).chunk(2)
    return mean, (square - mean.square()).clamp_min(0.0), total[-1]


def _per_channel(values: Tensor) -> Tensor:
    """Arrange (C,) for (B, C, H, W)."""
    return values.view(1, -1, 1, 1)
