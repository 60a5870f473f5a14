"""Image kernels of the BSRGAN degradation (Zhang et al. 2021, arXiv 2103.14006) and of MATLAB's `imresize`; numpy only.

Legend: image (H, W, C) or (H, W) float; kernel (k, k) float64 that sums to one; s scale of a resize.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["anisotropic_gaussian_kernel", "bicubic_resize", "gaussian_kernel", "shift_kernel"]


def bicubic_resize(image: np.ndarray, scale: float, antialias: bool = True) -> np.ndarray:
    """Resize (H, W[, C]) to (ceil(sH), ceil(sW)[, C]) as MATLAB does: Keys' cubic with a = -1/2, symmetric borders.

    `antialias` widens the kernel by 1/s when s < 1. Values are not clipped; the dtype is kept.
    """
    rows = _resize_matrix(image.shape[0], scale, antialias)  # (sH, H)
    columns = _resize_matrix(image.shape[1], scale, antialias)  # (sW, W)
    resized = np.einsum("ih,hw...,jw->ij...", rows, image.astype(np.float64), columns, optimize=True)
    return resized.astype(image.dtype)


def _resize_matrix(length: int, scale: float, antialias: bool) -> np.ndarray:
    """Return the weights (ceil(s * length), length) of each input sample in each output sample."""
    stretch = scale if antialias and scale < 1 else 1.0
    num_outputs = math.ceil(length * scale)
    centres = (np.arange(num_outputs) + 0.5) / scale - 0.5
    reach = math.ceil(2 / stretch)
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-reach, reach + 2)
    weights = _cubic((centres[:, None] - taps) * stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = taps % (2 * length)
    mirrored = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    matrix = np.zeros((num_outputs, length))
    np.add.at(matrix, (np.arange(num_outputs)[:, None], mirrored), weights)
    return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def gaussian_kernel(size: int, sigma: float) -> np.ndarray:
    """Return the isotropic Gaussian (size, size) with standard deviation `sigma` in pixels."""
    offsets = np.arange(size) - (size - 1) / 2
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    kernel[kernel < np.finfo(float).eps * kernel.max()] = 0
    return _normalised(kernel)


def anisotropic_gaussian_kernel(size: int, angle: float, variance1: float, variance2: float) -> np.ndarray:
    """Return the Gaussian (size, size) whose covariance has these variances along and across the direction `angle`."""
    offsets = np.arange(size) - (size - 1) / 2
    x, y = np.meshgrid(offsets, offsets)
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.sin(angle) * x - math.cos(angle) * y
    return _normalised(np.exp(-0.5 * (along**2 / variance1 + across**2 / variance2)))


def _normalised(kernel: np.ndarray) -> np.ndarray:
    total = kernel.sum()
    return kernel / total if total > 0 else kernel


def shift_kernel(kernel: np.ndarray, factor: int, towards_upper_left: bool = True) -> np.ndarray:
    """Move (H, W) content by (factor - 1) / 2 pixels, bilinearly, edges repeated.

    A stride of `factor` keeps the upper left pixel of each cell; the shift centres the kernel on the cell.
    """
    shift = (factor - 1) / 2 if towards_upper_left else -(factor - 1) / 2
    rows, columns = (_shift_matrix(length, shift) for length in kernel.shape)
    return rows @ kernel @ columns.T


def _shift_matrix(length: int, shift: float) -> np.ndarray:
    places = np.clip(np.arange(length) + shift, 0, length - 1)
    return np.maximum(0.0, 1 - np.abs(places[:, None] - np.arange(length)))
