"""Measures of toy tasks: real scenes agree with their own conditions, and not with those of others."""

import pytest
import torch

from ldm.data.core.loader import collate
from ldm.evaluation.image_metrics import psnr
from ldm.toy import metrics
from ldm.toy.shapes import Shapes


@pytest.fixture(scope="module")
def scenes():
    data = Shapes(40, size=32)
    return collate([data[i] for i in range(40)])


def rolled(value):
    return value.roll(len(value) // 2, 0)


def test_real_scenes_lie_in_their_boxes(scenes):
    right = metrics.layout_iou(scenes["image"], scenes)
    wrong = metrics.layout_iou(scenes["image"], {key: rolled(scenes[key]) for key in ("boxes", "box_labels")})
    assert right.shape == (40,) and right.mean() > 0.8 and wrong.mean() < 0.15


def test_a_thing_counts_for_one_box_only(scenes):
    one = torch.tensor([[0.3, 0.3, 0.3, 0.3]] * 3)[None]
    labels = scenes["box_labels"][:1].clone()
    labels[:] = labels[0, 0]
    assert metrics.layout_iou(scenes["image"][:1], {"boxes": one, "box_labels": labels}) <= 1 / 3


def test_real_scenes_show_their_maps(scenes):
    images, maps = scenes["image"], scenes["segmentation"]
    assert metrics.map_accuracy(images, scenes).min() > 0.95
    assert metrics.map_iou(images, scenes).mean() > 0.9
    assert metrics.map_iou(images, {"segmentation": rolled(maps)}).mean() < 0.35
    blank = torch.ones_like(images)
    assert metrics.map_iou(blank, scenes).max() == 0


def test_psnr_of_a_known_error_also_in_a_region():
    images = torch.zeros(2, 3, 8, 8)
    targets = images.clone()
    targets[:, :, :4] = 0.2
    mask = -torch.ones(2, 1, 8, 8)
    mask[:, :, :4] = 1
    assert psnr(images, targets, mask) == pytest.approx([20.0, 20.0], abs=1e-3)
    assert psnr(images, targets) == pytest.approx([23.0103, 23.0103], abs=1e-3)


def test_enlarging_a_shrunk_smooth_picture_gives_it_back_and_blur_lowers_sharpness():
    ramp = torch.linspace(-0.5, 0.5, 32).expand(1, 3, 32, 32)
    again = metrics.enlarged(metrics.shrunk(ramp, 4), 4)
    assert (again - ramp)[..., 6:-6].abs().max() < 0.01
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    blurred = metrics.enlarged(metrics.shrunk(noise, 4), 4)
    assert metrics.sharpness(blurred) < 0.2 * metrics.sharpness(noise)


def test_a_smooth_fill_is_harmonic_and_changes_the_hole_only():
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    mask = -torch.ones(1, 1, 16, 16)
    mask[..., 5:11, 5:11] = 1
    filled = metrics.smoothly_filled(torch.where(mask > 0, torch.tensor(9.0), ramp), mask)
    assert (filled - ramp).abs().max() < 1e-3
    assert torch.equal(filled.where(mask < 0, 0), ramp.where(mask < 0, 0))
