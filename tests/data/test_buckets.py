"""Buckets of sizes: which sizes there are, which image gets which, the order of an epoch, training on several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import distributed
from ldm.data.core.buckets import Bucketed, BucketSampler, bucket_sizes, grouped_order
from ldm.data.core.module import DataModule
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError

SHAPES = [(64, 64), (128, 64), (130, 62), (40, 80), (200, 100), (64, 66), (50, 100), (300, 20), (63, 64), (90, 45)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (width, height) in enumerate(SHAPES):
        image = Image.new("RGB", (width, height), (number, 0, 0))
        image.save(tmp_path / f"{number:02}.png")
    return tmp_path


def bucketed(folder: Path, **options: object) -> Bucketed:
    return Bucketed(ImageFolder(folder, 32, crop="random"), **{"multiple": 8, "longest": 2.0} | options)


def test_sizes_have_about_one_area_and_come_in_pairs() -> None:
    sizes = bucket_sizes(512, 512, 64, 2.0)
    assert (512, 512) in sizes and (704, 384) in sizes and len(sizes) == len(set(sizes))
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0 and max(height, width) <= 2 * min(height, width)
        assert abs(height * width / 512**2 - 1) < 0.15
    assert bucket_sizes(32, 32, 32, 4.0) == [(32, 32)] or (64, 16) not in bucket_sizes(32, 32, 32, 4.0)
    with pytest.raises(UserError, match="500x512"):
        bucket_sizes(500, 512, 64, 2.0)


def test_each_image_has_the_size_nearest_to_its_shape(folder: Path) -> None:
    data = bucketed(folder)
    for number, (width, height) in enumerate(SHAPES):
        image = data[number]["image"]
        ratio = np.log(width / height).clip(-np.log(2), np.log(2))
        best = min(data.sizes, key=lambda size: abs(np.log(size[1] / size[0]) - ratio))
        assert tuple(image.shape[1:]) == best
        assert torch.unique(image[0]).numel() == 1 and round(float(image[0, 0, 0] + 1) * 127.5) == number


def test_orientation_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    dataset = ImageFolder(tmp_path, 32)
    assert dataset.aspect_ratio(0) == 0.5
    height, width = Bucketed(dataset, multiple=8)[0]["image"].shape[1:]
    assert height > width


def test_rare_sizes_give_their_images_to_the_nearest_other(folder: Path) -> None:
    counts = np.bincount(bucketed(folder, least=3).buckets)
    assert counts.min() >= 3 and counts.sum() == len(SHAPES)
    assert len(bucketed(folder, least=100).sizes) == 1


def test_an_epoch_gives_every_image_in_batches_of_one_size() -> None:
    groups = np.random.RandomState(0).randint(0, 5, 103)
    order = grouped_order(groups, 8, seed=3, epoch=1)
    assert all(len(set(groups[batch])) == 1 for batch in order)
    assert set(order.flatten()) == set(range(103))
    times = np.bincount(order.flatten())
    assert times.max() <= 2 and order.size - 103 < 8 * 5
    assert np.array_equal(order, grouped_order(groups, 8, seed=3, epoch=1))
    assert not np.array_equal(order, grouped_order(groups, 8, seed=3, epoch=2))


def test_ranks_share_the_batches_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bucketed(folder, least=2)

    def steps(rank: int, world: int, batch_size: int, accumulate: int = 1) -> np.ndarray:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        sampler = BucketSampler(data, batch_size, accumulate, seed=1)
        indices = [key.index for key in sampler]
        assert len(indices) == len(sampler)
        return np.array(indices).reshape(-1, batch_size * accumulate)

    whole, parts = steps(0, 1, 2), [steps(rank, 2, 1) for rank in (0, 1)]
    assert np.array_equal(np.stack(parts, axis=-1).reshape(whole.shape), whole)
    assert np.array_equal(steps(0, 1, 1, accumulate=2), whole)


def test_a_step_of_several_batches_is_of_one_size(folder: Path) -> None:
    data = bucketed(folder, least=2)
    batches = [batch["image"].shape for batch in DataModule(1, train=data, num_workers=0).train_loader(accumulate=2)]
    assert len(set(batches)) > 1 and batches[::2] == batches[1::2]
    with pytest.raises(UserError, match="do not fill a batch of 4; set least: 4"):
        next(iter(DataModule(1, train=data, num_workers=0).train_loader(accumulate=4)))


def test_images_that_are_cropped_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        bucketed(folder)
    assert "2 of 10 images are longer than 2:1 and are cropped to it, the first is 02.png" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was(folder: Path, workers: int) -> None:
    def loader() -> object:
        return DataModule(2, train=bucketed(folder, least=2), num_workers=workers, seed=5).train_loader()

    whole = [batch["image"] for batch in loader()]
    assert len({image.shape for image in whole}) > 1
    first = loader()
    begun = iter(first)
    next(begun), next(begun)
    later = loader()
    later.load_state_dict(first.state_dict())
    rest = [batch["image"] for batch in later]
    assert len(rest) == len(whole) - 2 and all(map(torch.equal, rest, whole[2:]))


def test_an_unreadable_image_is_replaced_in_the_size_of_its_place(folder: Path) -> None:
    data = bucketed(folder)
    (folder / "00.png").write_bytes(b"damaged")
    assert data[0]["image"].shape[1:] == (32, 32) and data[1]["image"].shape[1:] != (32, 32)


def test_mistakes(folder: Path) -> None:
    with pytest.raises(UserError, match="do not fill a batch of 4; set least: 4"):
        next(iter(DataModule(4, train=bucketed(folder)).train_loader()))
    with pytest.raises(UserError, match="evaluation"):
        DataModule(2, validation=bucketed(folder)).validation_loader()
    for options in ({"crop": "none"}, {"resize": 64}):
        with pytest.raises(UserError, match="crop: center or random"):
            Bucketed(ImageFolder(folder, 32, **options), multiple=8)
