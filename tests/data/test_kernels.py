import numpy as np
import pytest

from ldm.data.image_pairs.kernels import anisotropic_gaussian_kernel, bicubic_resize, gaussian_kernel, shift_kernel


def ramp(height, width):
    return np.add.outer(np.arange(height, dtype=np.float64), 2 * np.arange(width, dtype=np.float64))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("scale", [0.25, 0.5, 0.7, 1.0, 2.0, 3.3])
def test_resize_keeps_constants_and_sizes(scale, antialias):
    image = np.full((12, 20, 3), 0.3, np.float32)
    got = bicubic_resize(image, scale, antialias)
    assert got.shape == (int(np.ceil(12 * scale)), int(np.ceil(20 * scale)), 3) and got.dtype == np.float32
    np.testing.assert_allclose(got, 0.3, rtol=1e-6)


def test_resize_by_one_is_the_identity():
    np.testing.assert_allclose(bicubic_resize(ramp(5, 7), 1.0), ramp(5, 7), atol=1e-12)


def test_resize_follows_a_ramp_inside():
    got = bicubic_resize(ramp(32, 32), 0.5)
    rows, columns = np.meshgrid(2 * np.arange(16) + 0.5, 2 * np.arange(16) + 0.5, indexing="ij")
    np.testing.assert_allclose(got[4:-4, 4:-4], (rows + 2 * columns)[4:-4, 4:-4], atol=1e-9)


def test_antialiasing_removes_what_cannot_be_shown():
    stripes = np.tile([0.0, 1.0], (9, 15))
    for antialias, contrast in ((False, 1.0), (True, 0.0)):
        inside = bicubic_resize(stripes, 1 / 3, antialias)[:, 2:-2]
        np.testing.assert_allclose(np.ptp(inside), contrast, atol=0.02)


def test_gaussians_have_their_moments():
    offsets = np.arange(41) - 20
    kernel = gaussian_kernel(41, 2.0)
    assert kernel.sum() == pytest.approx(1) and (kernel.sum(0) * offsets**2).sum() == pytest.approx(4.0, rel=1e-6)
    kernel = anisotropic_gaussian_kernel(41, 0.6, 9.0, 2.0)
    x, y = np.meshgrid(offsets, offsets)
    along = np.cos(0.6) * x + np.sin(0.6) * y
    assert (kernel * along**2).sum() == pytest.approx(9.0, rel=1e-4)
    assert (kernel * (x**2 + y**2)).sum() == pytest.approx(11.0, rel=1e-4)


def test_equal_variances_are_isotropic():
    np.testing.assert_allclose(anisotropic_gaussian_kernel(15, 1.1, 4.0, 4.0), gaussian_kernel(15, 2.0), atol=1e-9)


def test_vanishing_width_is_a_single_point():
    kernel = gaussian_kernel(5, 1e-3)
    assert kernel[2, 2] == 1 and kernel.sum() == 1


def test_shift_moves_content_by_half_the_factor_less_one():
    kernel = gaussian_kernel(25, 2.0)
    centre = np.arange(25)
    for factor, towards, want in ((4, True, 12 - 1.5), (4, False, 12 + 1.5), (1, True, 12.0)):
        moved = shift_kernel(kernel, factor, towards)
        assert (moved.sum(0) * centre).sum() / moved.sum() == pytest.approx(want, abs=1e-3)
