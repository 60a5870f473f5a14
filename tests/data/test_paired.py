import logging

import numpy as np
import pytest
import torch
from picture_files import pixels, png, write_pictures
from PIL import Image

from ldm.data.core.transforms import SampleKey
from ldm.data.image_pairs.paired import ADE20K, PairedFolder
from ldm.errors import UserError

K = 5
RANDOM = {"crop": "random", "flip": 0.5, "resize": "none"}


def classes(index, height=12, width=16):
    """Make an index map that its image shows as well: the red channel is 40 times the index."""
    return np.random.RandomState(100 + index).randint(0, K, (height, width)).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_pairs(root, count=4, convert=lambda array: array, **size):
    """Write images whose red channel tells the index map of their target."""
    names = [f"{'sub/' if i % 2 else ''}{i}" for i in range(count)]
    for i, name in enumerate(names):
        image, indices = pixels(i, **size), classes(i, **size)
        image[..., 0] = indices * 40
        save(root / "images" / f"{name}.png", image)
        save(root / "maps" / f"{name}.png", convert(indices))
    return root / "images", root / "maps"


def red_tells(item):
    return ((item["image"][0] + 1) * 127.5 / 40).round().long()


@pytest.mark.parametrize("crop", ["center", "random", "random_size", "random_half", "none"])
@pytest.mark.parametrize("size", [8, [6, 10], [12, 16]])
def test_maps_get_the_crop_and_the_mirroring_of_the_image(tmp_path, crop, size):
    images, maps = write_pairs(tmp_path)
    options = {"crop": crop, "flip": 0.5, "resize": "none", "interpolation": "nearest"}
    dataset = PairedFolder(images, size, maps, num_classes=K, **options)
    if crop in ("random_size", "random_half") or (crop == "none" and size != [12, 16]):
        return  # scaled: nearest neighbours of PIL and of maps may differ by a pixel; sizes alone
    for epoch in range(4):
        for i in range(4):
            item = dataset[SampleKey(i, epoch)]
            assert item["segmentation"].dtype == torch.int64
            assert torch.equal(item["segmentation"], red_tells(item))


@pytest.mark.parametrize("crop", ["center", "random", "random_size", "random_half", "none"])
def test_scaled_maps_follow_the_image(tmp_path, crop):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:30, 20:50] = 255
    save(tmp_path / "images" / "a.png", picture)
    save(tmp_path / "maps" / "a.png", (picture[..., 0] > 0).astype(np.uint8))
    options = {"crop": crop, "flip": 0.5, "interpolation": "bilinear"}
    dataset = PairedFolder(tmp_path / "images", 16, tmp_path / "maps", num_classes=2, **options)
    for epoch in range(8):
        item = dataset[SampleKey(0, epoch)]
        bright = item["image"][0] > 0
        assert item["segmentation"].shape == (16, 16)
        assert (bright == (item["segmentation"] > 0)).float().mean() > 0.9


@pytest.mark.parametrize(
    "convert",
    [
        lambda array: array.astype(np.uint16),
        lambda array: array.repeat(2, axis=0).repeat(2, axis=1),
    ],
    ids=["16 bit", "twice as large"],
)
def test_kinds_of_maps(tmp_path, convert):
    images, maps = write_pairs(tmp_path, convert=convert)
    for item in PairedFolder(images, [12, 16], maps, num_classes=K):
        assert torch.equal(item["segmentation"], red_tells(item))


def test_palettes_hold_indices(tmp_path):
    images, maps = write_pairs(tmp_path, 1)
    indexed = Image.fromarray(classes(0)).convert("P")
    indexed.putdata(classes(0).ravel().tolist())
    indexed.putpalette([255, 0, 0, 7, 7, 7] * 128)
    indexed.save(maps / "0.png")
    item = PairedFolder(images, [12, 16], maps, num_classes=K)[0]
    assert torch.equal(item["segmentation"], red_tells(item))


def test_an_index_beyond_the_classes_names_the_file(tmp_path):
    images, maps = write_pairs(tmp_path)
    array = classes(0)
    array[3, 4] = 255
    save(maps / "0.png", array)
    with pytest.raises(UserError, match=r"0.png: class index 255, but num_classes=5 allows 0 to 4; raise num_classes"):
        PairedFolder(images, [12, 16], maps, num_classes=K)[0]
    item = PairedFolder(images, [12, 16], maps, num_classes=K, ignore_index=255)[0]
    assert item["segmentation"][3, 4] == -1 and (item["segmentation"] >= 0).sum() == 12 * 16 - 1


def test_a_negative_index_is_no_class_only_if_it_is_said_to_be(tmp_path):
    images, maps = write_pairs(tmp_path, 1)
    (maps / "0.png").unlink()
    np.save(maps / "0.npy", np.where(classes(0) == 2, -7, classes(0).astype(int)))
    with pytest.raises(UserError, match=r"0.npy: class index -7, .* allows 0 to 4; set ignore_index: -7"):
        PairedFolder(images, [12, 16], maps, num_classes=K)[0]
    item = PairedFolder(images, [12, 16], maps, num_classes=K, ignore_index=-7)[0]
    assert torch.equal(item["segmentation"] == -1, torch.from_numpy(classes(0) == 2))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [("0.png", pixels(0), "it has the mode RGB"), ("0.jpg", classes(0), "JPEG changes indices")],
)
def test_what_is_no_index_map_is_refused(tmp_path, name, array, message):
    images, maps = write_pairs(tmp_path, 1)
    (maps / "0.png").unlink()
    save(maps / name, array)
    with pytest.raises(UserError, match=f"{name}: no map of class indices, {message}"):
        PairedFolder(images, 8, maps, num_classes=K)[0]


def test_images_without_target_are_left_out_and_named(tmp_path, caplog):
    images, maps = write_pairs(tmp_path)
    (maps / "sub" / "1.png").unlink()
    save(maps / "extra.png", classes(0))
    with caplog.at_level(logging.WARNING):
        dataset = PairedFolder(images, 8, maps, num_classes=K)
    assert dataset.names == ["0.png", "2.png", "sub/3.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 4 images have no target in {maps} and are left out, the first is sub/1.png",
        f"1 files in {maps} have no image, the first is extra.png",
    ]


def test_a_target_of_another_shape_is_skipped_and_named(tmp_path, caplog):
    images, maps = write_pairs(tmp_path)
    save(maps / "0.png", classes(0, 16, 12))
    (maps / "2.png").write_bytes(b"broken")
    dataset = PairedFolder(images, 8, maps, num_classes=K)
    with caplog.at_level(logging.WARNING):
        items = list(dataset)
    assert dataset.errors.num_unreadable == 2 and torch.equal(items[0]["image"], items[2]["image"])
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("0.png cannot be read and is skipped") and "maps/0.png: the target is 16x12" in first
    assert second.startswith("2.png") and "maps/2.png" in second


def test_twins_show_the_same_place_at_a_quarter_of_the_size(tmp_path):
    height, width = 32, 48
    for i in range(3):
        small = pixels(i, height // 4, width // 4)
        save(tmp_path / "low" / f"{i}.png", small)
        save(tmp_path / "high" / f"{i}.png", small.repeat(4, axis=0).repeat(4, axis=1))
    dataset = PairedFolder(tmp_path / "high", [16, 24], tmp_path / "low", "low_res", factor=4, **RANDOM)
    places = set()
    for epoch in range(6):
        for i in range(3):
            item = dataset[SampleKey(i, epoch)]
            assert item["low_res"].shape == (3, 4, 6)
            assert torch.equal(item["image"], item["low_res"].repeat_interleave(4, 1).repeat_interleave(4, 2))
            places.add(float(item["low_res"].sum()))
    assert len(places) > 6


def test_twins_of_scaled_images_match_within_interpolation(tmp_path):
    rows, columns = np.mgrid[0:64, 0:96]
    large = np.stack([rows * 4, columns * 2, rows + columns], axis=-1).astype(np.uint8)
    save(tmp_path / "high" / "a.png", large)
    save(tmp_path / "low" / "a.png", np.asarray(Image.fromarray(large).resize((24, 16), Image.Resampling.BOX)))
    options = {"crop": "random", "flip": 0.5, "resize": 40}
    dataset = PairedFolder(tmp_path / "high", 32, tmp_path / "low", "low_res", factor=4, **options)
    for epoch in range(6):
        item = dataset[SampleKey(0, epoch)]
        want = torch.nn.functional.avg_pool2d(item["image"], 4)
        assert (item["low_res"] - want).abs().mean() < 0.03


def test_a_target_of_another_factor_is_skipped(tmp_path, caplog):
    save(tmp_path / "high" / "a.png", pixels(0, 32, 32))
    save(tmp_path / "low" / "a.png", pixels(0, 16, 16))
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        PairedFolder(tmp_path / "high", 16, tmp_path / "low", factor=4)[0]
    assert "the target is 16x16, not 1/4 of the image's 32x32" in caplog.text


def test_any_image_can_be_the_target(tmp_path):
    save(tmp_path / "a" / "x.png", pixels(0))
    save(tmp_path / "b" / "x.png", pixels(0)[..., 1])
    item = PairedFolder(tmp_path / "a", 8, tmp_path / "b", "edges", target_channels=1, crop="random", resize="none")[0]
    assert item["edges"].shape == (1, 8, 8) and torch.equal(item["edges"][0], item["image"][1])


def test_suffixes_in_one_folder(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png", pixels(i))
        save(tmp_path / f"{i}_map.png", classes(i))
    with pytest.raises(UserError, match="is the folder of the images too, .* set suffix"):
        PairedFolder(tmp_path, 8, tmp_path / ".." / tmp_path.name, num_classes=K)
    dataset = PairedFolder(tmp_path, 8, tmp_path, num_classes=K, suffix="_map")
    assert dataset.names == ["0.png", "1.png"] and dataset[0]["segmentation"].shape == (8, 8)


def test_splits_and_repeats_keep_pairs_together(tmp_path):
    images, maps = write_pairs(tmp_path, 8)
    both = {"num_classes": K, "validation_share": 0.4, "repeats": 2, **RANDOM}
    parts = [PairedFolder(images, 8, maps, split=split, **both) for split in ("train", "validation")]
    assert sorted(name for part in parts for name in part.names) == sorted(
        path.relative_to(images).as_posix() for path in images.rglob("*.png")
    )
    for part in parts:
        for i in range(len(part)):
            assert torch.equal(part[i]["segmentation"], red_tells(part[i]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_root": "absent"}, "absent: no such folder"),
        ({"factor": 3}, "factor 3 must divide size 8x8"),
        ({"num_classes": K, "factor": 2}, "and be 1 with num_classes"),
        ({"num_classes": 0}, "num_classes 0 must be positive"),
        ({"ignore_index": 255}, "be given with ignore_index"),
        ({"suffix": "_x"}, "none of 2 images .* a_x.png"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, change, message):
    write_pictures(tmp_path / "a", 2)
    write_pictures(tmp_path / "b", 2)
    params = {"target_root": tmp_path / "b", **change}
    with pytest.raises(UserError, match=message) as caught:
        PairedFolder(tmp_path / "a", 8, **params)
    assert "\n" not in str(caught.value)


def test_two_targets_of_one_image_are_a_mistake(tmp_path):
    images, maps = write_pairs(tmp_path, 1)
    (maps / "0.bmp").write_bytes(png(classes(0)))
    with pytest.raises(UserError, match="0.bmp and 0.png are targets"):
        PairedFolder(images, 8, maps, num_classes=K)


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path / "images" / split / "ADE_1.jpg", pixels(1))
        save(tmp_path / "annotations" / split / "ADE_1.png", np.full((12, 16), 150, np.uint8))
    for split in ("train", "validation"):
        item = ADE20K(tmp_path, 8, split=split)[0]
        assert item["segmentation"].shape == (8, 8) and (item["segmentation"] == 150).all()
    with pytest.raises(UserError, match="split 'all' is not one of train, validation"):
        ADE20K(tmp_path, 8, split="all")


def test_targets_have_the_range_of_the_images(tmp_path):
    for folder in ("images", "targets"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "0.npy", np.full((8, 8), 4095, np.uint16))
    options = {"channels": 1, "key": "target", "value_range": [0, 4095]}
    item = PairedFolder(tmp_path / "images", 8, tmp_path / "targets", **options)[0]
    assert item["target"].min() == item["image"].min() == 1
