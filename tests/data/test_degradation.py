import random
import sys

import numpy as np
import pytest

from ldm.data.image_pairs.degradation import RandomStates, bsrgan, bsrgan_light
from ldm.errors import UserError

pytest.importorskip("cv2")


def picture(height=48, width=64):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4 % 256, columns * 3 % 256, (rows + columns) * 2 % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("recipe", [bsrgan, bsrgan_light])
@pytest.mark.parametrize("factor", [2, 4])
def test_shrinks_by_the_factor_whatever_is_drawn(recipe, factor):
    degrade = recipe(factor)
    for seed in range(12):
        got = degrade(picture(50, 67), RandomStates.seeded(seed))
        assert got.shape == (50 // factor, 67 // factor, 3) and got.dtype == np.uint8


@pytest.mark.parametrize("recipe", [bsrgan, bsrgan_light])
def test_is_a_function_of_the_draws(recipe):
    results = [recipe()(picture(), RandomStates.seeded(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(results[0], results[1]) and not np.array_equal(results[0], results[2])


def test_global_generators_give_the_same():
    random.seed(5)
    np.random.seed(5)
    got = bsrgan_light()(picture(), RandomStates(random, np.random))
    assert np.array_equal(got, bsrgan_light()(picture(), RandomStates.seeded(5)))


def test_light_is_milder():
    smooth = np.full((64, 64, 3), 128, np.uint8)
    smooth[:, 32:] = 160
    want = smooth[::4, ::4].astype(float)

    def error(degrade):
        return np.mean([np.abs(degrade(smooth, RandomStates.seeded(seed)) - want).mean() for seed in range(10)])

    assert error(bsrgan_light()) < 0.5 * error(bsrgan())


@pytest.mark.parametrize("image", [picture().astype(np.float32), picture()[..., 0], picture()[:2]])
def test_other_images_are_refused(image):
    with pytest.raises(UserError, match="needs a uint8 image"):
        bsrgan()(image, RandomStates.seeded(0))


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"opencv-python-headless .*extra `superres`"):
        bsrgan()(picture(), RandomStates.seeded(0))
