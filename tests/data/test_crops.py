"""Crops: scale, corner and flip, drawn once for an image and its targets."""

import numpy as np
import pytest
import torch
from picture_files import pixels, png

from ldm.data.core.transforms import CropParams, ImageTransform, open_image


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("crop", ["center", "random", "random_size", "random_half", "none"])
@pytest.mark.parametrize("resize", ["size", "none", 20])
def test_params_lie_in_the_image_and_applying_them_is_the_transform(crop, resize):
    image = open_image(png(pixels(0, 30, 50)))
    for seed in range(20):
        transform = ImageTransform([16, 20], crop, resize, flip=0.5)
        params = transform.sample_crop(image, rng(seed))
        assert 0 <= params.left <= params.width - 20 and 0 <= params.top <= params.height - 16
        assert torch.equal(transform.apply(image, params), transform(image, rng(seed)))


def test_crops_of_any_size_go_from_full_resolution_to_the_whole():
    image = open_image(png(pixels(0, 64, 96)))
    transform = ImageTransform(16, "random_size")
    sides = np.array([64 * 16 / transform.sample_crop(image, rng(seed)).height for seed in range(600)])
    assert 15.5 < sides.min() < 18 and 60 < sides.max() < 64.5
    counts = np.histogram(sides, 6, (16, 64))[0]
    assert counts.min() > 60
    assert transform.sample_crop(open_image(png(pixels(0, 8, 9))), rng()).height == 16


def test_crops_from_half_of_the_image_on():
    image = open_image(png(pixels(0, 64, 96)))
    transform = ImageTransform(16, "random_half")
    sides = np.array([64 * 16 / transform.sample_crop(image, rng(seed)).height for seed in range(600)])
    assert 31.5 < sides.min() < 34 and 62 < sides.max() < 64.5
    assert np.histogram(sides, 4, (32, 64))[0].min() > 100


def test_a_crop_says_what_is_seen():
    image = open_image(png(pixels(3, 20, 30)))
    transform = ImageTransform([5, 6], "random", "none", flip=1.0)
    crop = transform.sample_crop(image, rng(4))
    assert crop[:2] == (30, 20) and crop.flip
    seen = np.asarray(image)[crop.top : crop.top + 5, crop.left : crop.left + 6][:, ::-1]
    want = torch.from_numpy(seen.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert torch.equal(transform.apply(image, crop), want)
    assert CropParams(4, 4) == (4, 4, 0, 0, False)
