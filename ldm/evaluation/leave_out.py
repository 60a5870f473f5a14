"""Distances between sets of features (N, d) without each group of samples, from sums: cheaper than one by one.

groups: the number of each sample's group, 0..GROUPS - 1, (N,).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.evaluation.intervals import GROUPS

KernelFunction = Callable[[Tensor, Tensor], Tensor]  # float64 (N, d), (M, d) -> (N, M)


def frechet_without(features: np.ndarray, groups: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> list[float]:
    """Return the Fréchet distance to a Gaussian without each group, from its d x d matrix of second moments.

    tr (S1 S2)^(1/2) is had from the symmetric R S1 R with R = S2^(1/2), which has the same eigenvalues.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    centre, found = features.mean(0, dtype=np.float64), []
    parts = [features[groups == group].astype(np.float64) - centre for group in range(GROUPS)]
    total = sum(part.T @ part for part in parts)
    for part in parts:
        count = len(features) - len(part)
        shift = -part.sum(0) / count
        ours = (total - part.T @ part - count * np.outer(shift, shift)) / (count - 1)
        roots = np.sqrt(np.linalg.eigvalsh(root @ ours @ root).clip(0))
        found.append(float(np.square(centre + shift - mean).sum() + np.trace(ours) + values.sum() - 2 * roots.sum()))
    return found


def mmd_without(kernel: KernelFunction, x: Tensor, y: Tensor, groups: np.ndarray) -> list[float]:
    """Return the unbiased MMD^2 of samples x (N, d) and y (M, d) without each group, but for what y alone adds."""
    number = torch.from_numpy(groups)
    within, across = torch.zeros(GROUPS, GROUPS, dtype=torch.float64), torch.zeros(GROUPS, dtype=torch.float64)
    for group in range(GROUPS):  # sums of the kernel over pairs of groups, without a sample and itself
        part = x[number == group]
        within[group].index_add_(0, number, kernel(part, x).sum(0))
        within[group, group] -= kernel(part, part).trace()
        across[group] = kernel(part, y).mean(1).sum()
    left = len(x) - torch.bincount(number, minlength=GROUPS)
    pairs = within.sum() - 2 * within.sum(1) + within.diagonal()
    return (pairs / (left * (left - 1)) - 2 * (across.sum() - across) / left).tolist()
