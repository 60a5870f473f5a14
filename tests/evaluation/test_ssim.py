"""Structural similarity: closed forms, and the figures of another implementation."""

import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.image_metrics import ssim


def test_equal_pictures_have_one_and_grey_pictures_the_closed_form():
    x = torch.rand(2, 3, 20, 16) * 2 - 1
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    c1, a, b = (0.01 * 2) ** 2, 0.5, -0.25
    flat = torch.ones(1, 1, 12, 12)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    torch.testing.assert_close(ssim(a * flat, b * flat), torch.tensor([expected]))


def test_it_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    torch.manual_seed(0)
    x = torch.rand(2, 3, 24, 31) * 2 - 1
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    options = {"data_range": 2.0, "reduction": "none", "return_full_image": True}
    _, theirs = torchmetrics.structural_similarity_index_measure(y, x, **options)
    inside = theirs[..., 5:-5, 5:-5].mean((1, 2, 3))  # they also count windows that stick out
    torch.testing.assert_close(ssim(y, x), inside, atol=1e-4, rtol=1e-4)


def test_small_pictures_are_refused():
    with pytest.raises(UserError, match="8x20; it needs sides of 11"):
        ssim(torch.zeros(1, 3, 8, 20), torch.zeros(1, 3, 8, 20))
