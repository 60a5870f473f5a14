"""BSRGAN degradation (Zhang et al. 2021, arXiv 2103.14006) and its milder form for super-resolution (appendix D.6.1).

An image is blurred, shrunk, made noisy and compressed in random order; the result is the low-resolution input of the
task. All random numbers come from two generators of the caller, in the order of the published code.

Legend: image (H, W, 3) RGB, uint8 outside and float32 in [0, 1] inside; f = factor by which the sides shrink.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ldm.bounds import Count, Fraction
from ldm.data.core.optional import require
from ldm.data.image_pairs.kernels import anisotropic_gaussian_kernel, bicubic_resize, gaussian_kernel, shift_kernel
from ldm.errors import UserError

__all__ = ["Degradation", "RandomStates", "bsrgan", "bsrgan_light"]

_BLUR, _BLUR_AGAIN, _SHRINK, _FIT, _NOISE, _JPEG, _NOTHING = range(7)
_HALVE_FIRST, _COMPRESS = 0.25, 0.9  # probabilities that both recipes share


class RandomStates(NamedTuple):
    """The two generators; the modules `random` and `numpy.random` can be used as well."""

    python: random.Random
    numpy: np.random.RandomState

    @classmethod
    def seeded(cls, seed: int) -> RandomStates:
        """Make both from one seed in 0..2^32-1."""
        return cls(random.Random(seed), np.random.RandomState(seed))


@dataclass(frozen=True)
class Degradation:
    """Degrade uint8 (H, W, 3) to uint8 (H // f, W // f, 3).

    Kernel sizes are `stride * k + 3` for k in a range, widths are divided by `sharpness`; noise in 1/255 and JPEG
    quality are ranges, all inclusive; `plain_resize` is the probability of shrinking by an interpolation instead of by
    blur and stride.
    """

    factor: Count = 4
    blurs: tuple[int, ...] = (_BLUR, _BLUR_AGAIN)
    sharpness: float = 1.0
    stride: Count = 2
    isotropic_sizes: tuple[int, int] = (2, 11)
    noise: tuple[int, int] = (2, 25)
    quality: tuple[int, int] = (30, 95)
    plain_resize: Fraction = 0.75

    def __call__(self, image: np.ndarray, states: RandomStates) -> np.ndarray:
        """Apply a random degradation. Raises UserError without OpenCV or for another kind of image."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < self.factor:
            raise UserError(
                f"degradation: needs a uint8 image (H, W, 3) of at least {self.factor} pixels a side, "
                f"not {image.dtype} {tuple(image.shape)}"
            )
        height, width = (side - side % self.factor for side in image.shape[:2])
        pixels, factor = _to_float(image[:height, :width]), self.factor
        if factor == 4 and states.python.random() < _HALVE_FIRST:
            pixels, factor = _halved(pixels, states), 2
        target = (1, 1)
        for step in _order(states):
            if step in self.blurs:
                pixels = self._blur(pixels, factor, states)
            elif step == _SHRINK:
                target = tuple(int(1 / factor * side) for side in pixels.shape[:2])
                pixels = self._shrink(pixels, factor, states)
            elif step == _FIT:
                pixels = _resize(pixels, target, states)
            elif step == _NOISE:
                pixels = self._add_noise(pixels, states)
            elif step == _JPEG and states.python.random() < _COMPRESS:
                pixels = self._compress(pixels, states)
        return _to_uint8(self._compress(pixels, states))

    def _blur(self, pixels: np.ndarray, factor: int, states: RandomStates) -> np.ndarray:
        rng = states.python
        if rng.random() < 0.5:
            largest = (4 + factor) / self.sharpness
            variances = largest * rng.random(), largest * rng.random()
            size = self.stride * rng.randint(2, 11) + 3
            kernel = anisotropic_gaussian_kernel(size, rng.random() * math.pi, *variances)
        else:
            size = self.stride * rng.randint(*self.isotropic_sizes) + 3
            kernel = gaussian_kernel(size, (2 + 0.2 * factor) / self.sharpness * rng.random())
        return _convolve(pixels, kernel)

    def _shrink(self, pixels: np.ndarray, factor: int, states: RandomStates) -> np.ndarray:
        rng = states.python
        if rng.random() < self.plain_resize:
            ratio = rng.uniform(1, 2 * factor)
            return _resize(pixels, tuple(int(1 / ratio * side) for side in pixels.shape[:2]), states)
        kernel = shift_kernel(gaussian_kernel(25, rng.uniform(0.1, 0.6 * factor)), factor)
        blurred = _convolve(pixels, kernel / kernel.sum())
        return np.clip(blurred[::factor, ::factor], 0, 1)

    def _add_noise(self, pixels: np.ndarray, states: RandomStates) -> np.ndarray:
        lowest, highest = self.noise
        sigma, kind, rng = states.python.randint(lowest, highest) / 255, states.numpy.rand(), states.numpy
        if kind > 0.6:
            noise = rng.normal(0, sigma, pixels.shape)
        elif kind < 0.4:
            noise = rng.normal(0, sigma, (*pixels.shape[:2], 1))
        else:
            spectrum, axes = np.diag(rng.rand(3)), np.linalg.svd(rng.rand(3, 3))[0]
            covariance = np.abs((highest / 255) ** 2 * (axes.T @ spectrum @ axes))
            noise = rng.multivariate_normal(np.zeros(3), covariance, pixels.shape[:2])
        return np.clip(pixels + noise.astype(np.float32), 0, 1)

    def _compress(self, pixels: np.ndarray, states: RandomStates) -> np.ndarray:
        cv2 = _opencv()
        quality = states.python.randint(*self.quality)
        _, code = cv2.imencode(".jpg", _to_uint8(pixels)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        return _to_float(cv2.imdecode(code, cv2.IMREAD_COLOR)[..., ::-1])


def bsrgan(factor: Count = 4) -> Degradation:
    """Return the recipe of the BSRGAN paper without its camera model."""
    return Degradation(factor)


def bsrgan_light(factor: Count = 4) -> Degradation:
    """Return the milder recipe with which the paper's super-resolution model was trained."""
    return Degradation(
        factor,
        blurs=(_BLUR,),
        sharpness=4.0,
        stride=1,
        isotropic_sizes=(2, 4),
        noise=(1, 2),
        quality=(80, 95),
        plain_resize=0.8,
    )


def _order(states: RandomStates) -> list[int]:
    """Draw the order of the steps; fitting to the final size comes after shrinking."""
    order = states.python.sample(range(7), 7)
    shrink, fit = order.index(_SHRINK), order.index(_FIT)
    if shrink > fit:
        order[shrink], order[fit] = _FIT, _SHRINK
    return order


def _halved(pixels: np.ndarray, states: RandomStates) -> np.ndarray:
    if states.numpy.rand() < 0.5:
        return _resize(pixels, tuple(side // 2 for side in pixels.shape[:2]), states)
    return np.clip(bicubic_resize(pixels, 0.5), 0, 1)


def _resize(pixels: np.ndarray, size: tuple[int, ...], states: RandomStates) -> np.ndarray:
    cv2 = _opencv()
    interpolation = states.python.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA])
    height, width = (max(1, side) for side in size)
    return np.clip(cv2.resize(pixels, (width, height), interpolation=interpolation), 0, 1)


def _convolve(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    ndimage = require("scipy.ndimage", "degradation:", "scipy", extra="superres")
    return ndimage.convolve(pixels, kernel[:, :, None], mode="mirror")


def _to_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / np.float32(255)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)


def _opencv() -> ModuleType:
    return require("cv2", "degradation:", "opencv-python-headless", extra="superres")
