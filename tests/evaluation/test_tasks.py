"""The table of toy tasks: figures tell right conditions from shuffled ones; known pixels stay."""

import pytest
import torch

from ldm.data.core.loader import collate
from ldm.toy.digit_classifier import digit_classifier
from ldm.toy.shapes import Shapes
from ldm.toy.task_table import condition_images, digit_task, photo_tasks, scene_tasks, shuffled
from ldm.toy.thumbnails import ThumbnailNeighbours


@pytest.fixture(scope="module")
def scenes():
    data = ThumbnailNeighbours(Shapes(24, size=32), Shapes(2000, size=32, fields=()))
    return collate([data[i] for i in range(24)])


@pytest.mark.parametrize("name", scene_tasks())
def test_real_scenes_score_high_with_right_and_low_with_shuffled_conditions(scenes, name):
    figures = scene_tasks()[name].figures(scenes["image"], scenes)
    least = 0.6 if name == "retrieval" else 0.8
    for figure in figures.values():
        assert figure.get("right", 1) > least and figure.get("shuffled", 0) < figure.get("right", 1) - 0.1


def test_shuffling_moves_every_entry(scenes):
    others = shuffled(scenes)
    assert set(others) == set(scenes)
    assert others["caption"] == scenes["caption"][12:] + scenes["caption"][:12]
    assert torch.equal(others["image"][0], scenes["image"][12])


def test_the_condition_is_shown_as_a_picture_unless_it_is_words(scenes):
    tasks = scene_tasks()
    assert condition_images(tasks["text"], scenes) is None
    for name in ("layout", "semantic", "retrieval"):
        assert condition_images(tasks[name], scenes).shape == scenes["image"].shape


def test_photos_are_judged_beside_what_needs_no_model():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    mask = -torch.ones(4, 1, 32, 32)
    mask[..., 8:20, 8:20] = 1
    batch = {
        "image": image,
        "mask": mask,
        "masked_image": torch.where(mask > 0, -torch.ones(()), image),
        "low_res": torch.nn.functional.interpolate(image, scale_factor=0.25, mode="bicubic", antialias=True),
    }
    tasks = photo_tasks()
    superres = tasks["superres"].figures(image, batch)
    assert superres["PSNR, dB"]["right"] > 90 > superres["PSNR, dB, of bicubic enlarging"]["reference"]
    assert superres["sharpness, 1 is real"]["right"] == pytest.approx(1) and 0 < superres["PSNR, dB"]["shuffled"] < 20
    finished = tasks["inpainting"].finished(torch.zeros_like(image), batch)
    figures = tasks["inpainting"].figures(finished, batch)
    assert figures["largest change of a known pixel"]["right"] == 0
    assert torch.equal(finished[..., 8:20, 8:20], torch.zeros(4, 3, 12, 12))


def test_the_judge_of_digits_learns_and_leaves_the_random_state_alone():
    labels = torch.arange(10).repeat(8)
    images = -torch.ones(80, 3, 32, 32)
    for i, label in enumerate(labels.tolist()):
        images[i, :, 3 * label : 3 * label + 3] = 1
    state = torch.get_rng_state()
    classifier = digit_classifier(images, labels, num_steps=60)
    assert torch.equal(state, torch.get_rng_state())
    figures = digit_task(classifier).figures(images, {"image": images, "class_label": labels})
    assert figures["recognised by an independent classifier"]["right"] > 0.8
