"""Spectra of images whose power is known in closed form."""

from __future__ import annotations

import pytest
import torch

from ldm.doctor.spectrum import BANDS, kept_up_to, radial_power


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_factor_of_the_image_is_its_square_in_every_band(size: tuple[int, int]) -> None:
    x = noise(2, 3, *size)
    power = radial_power(x)
    assert power.shape == (2, BANDS) and bool((power > 0).all())
    torch.testing.assert_close(radial_power(0.5 * x + 0.3), 0.25 * power)  # a constant has no frequency
    assert kept_up_to(power[0].tolist(), power[0].tolist()) == 0.5


def test_white_noise_has_as_much_power_in_every_band() -> None:
    window = torch.hann_window(64, periodic=False, dtype=torch.float64)
    expected = torch.outer(window, window).square().mean()
    power = radial_power(noise(64, 3, 64, 64)).mean(0)
    torch.testing.assert_close(power[1:], expected.expand(BANDS - 1), rtol=0.05, atol=0)


def test_what_a_low_pass_takes_away_is_missing_above_its_limit() -> None:
    x = noise(4, 3, 64, 64)
    frequency = torch.fft.fftfreq(64, dtype=torch.float64)
    passes = torch.hypot(frequency[:, None], frequency[None]) <= 0.25
    rebuilt = torch.fft.ifft2(torch.fft.fft2(x) * passes).real
    before, after = radial_power(x).mean(0), radial_power(rebuilt).mean(0)
    half = BANDS // 2
    torch.testing.assert_close(after[: half - 1], before[: half - 1], rtol=0.02, atol=0)
    assert bool((after[half + 1 :] < 1e-3 * before[half + 1 :]).all())
    assert kept_up_to(before.tolist(), after.tolist()) == pytest.approx(0.25, abs=0.5 / BANDS)


def test_a_wave_is_in_its_band() -> None:
    x = torch.cos(2 * torch.pi * 0.3 * torch.arange(64.0)).expand(1, 1, 64, 64)
    assert radial_power(x).argmax().item() == int(0.3 * 2 * BANDS)
