import logging

import pytest
import torch
from picture_files import pixels, write_pictures
from PIL import Image

from ldm.data.core.base import positions_in_split
from ldm.data.core.cache import SizedCache
from ldm.data.core.transforms import SampleKey
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError


def test_reads_recursively_sorted_and_leaves_hidden_files_out(tmp_path):
    names = write_pictures(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(b"x")
    assert ImageFolder(tmp_path, 8).names == names == ["a.png", "c.png", "sub/b.png", "sub/d.png"]


def test_list_file_chooses_and_orders(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "list.txt").write_text("sub/b.png\n\na.png\n")
    dataset = ImageFolder(tmp_path, [12, 16], list_file=tmp_path / "list.txt")
    assert dataset.names == ["sub/b.png", "a.png"]
    want = torch.from_numpy(pixels(1)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(dataset[0]["image"], want)


def test_class_folders(tmp_path):
    for kind in ("dog", "cat"):
        write_pictures(tmp_path / kind, 2)
    dataset = ImageFolder(tmp_path, 8, class_folders=True)
    assert dataset.class_names == ["cat", "dog"]
    assert [item["class_label"] for item in dataset] == [0, 0, 1, 1]
    write_pictures(tmp_path, 1)
    with pytest.raises(UserError, match="class_folders needs every image in a folder"):
        ImageFolder(tmp_path, 8, class_folders=True)


def test_repeats_give_other_crops_of_the_same_file(tmp_path):
    write_pictures(tmp_path, 2)
    dataset = ImageFolder(tmp_path, 4, crop="random", resize="none", repeats=3)
    assert len(dataset) == 6 and dataset.num_files == 2
    crops = [dataset[i]["image"] for i in (0, 2, 4)]
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[1], crops[2])


@pytest.mark.parametrize("max_pixels", [0, 500, 10_000])
def test_decoded_images_are_kept_up_to_a_size(max_pixels):
    decoded = []

    def decode(file):
        decoded.append(file)
        return Image.new("L", (10, 20), file)

    kept = SizedCache(max_pixels, lambda image: image.width * image.height)
    got = [kept.get(file, decode).getpixel((0, 0)) for file in (1, 2, 1, 3, 1, 2)]
    assert got == [1, 2, 1, 3, 1, 2]
    assert decoded == {0: got, 500: [1, 2, 3, 2], 10_000: [1, 2, 3]}[max_pixels]


def test_splits_are_disjoint_complete_and_stable(tmp_path):
    names = [f"{i}.png" for i in range(2000)]
    validation = set(positions_in_split(names, "validation", 0.1))
    assert set(positions_in_split(names, "train", 0.1)) == set(range(2000)) - validation
    assert 150 < len(validation) < 250
    assert validation <= set(positions_in_split(names, "validation", 0.2))
    write_pictures(tmp_path)
    with pytest.raises(UserError, match="no images in the split 'validation' of 4; change validation_share=0 "):
        ImageFolder(tmp_path, 8, split="validation", validation_share=0.0)
    with pytest.raises(UserError, match="split 'test' must be one of all, train, validation"):
        ImageFolder(tmp_path, 8, split="test")


def test_unreadable_files_are_replaced_counted_and_named_once(tmp_path, caplog):
    write_pictures(tmp_path, 4)
    (tmp_path / "c.png").write_bytes(b"broken")
    dataset = ImageFolder(tmp_path, 8)
    with caplog.at_level(logging.WARNING):
        replaced = [dataset[1]["image"] for _ in range(3)]
    assert all(torch.equal(image, dataset[2]["image"]) for image in replaced)
    assert dataset.errors.num_unreadable == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("c.png cannot be read and is skipped")


def test_all_unreadable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 1 images can be read, the first is a.png"):
        ImageFolder(tmp_path, 8)[0]


def test_small_images_are_enlarged_with_one_warning(tmp_path, caplog):
    write_pictures(tmp_path, 2)
    dataset = ImageFolder(tmp_path, 32)
    with caplog.at_level(logging.WARNING):
        assert dataset[0]["image"].shape == dataset[1]["image"].shape == (3, 32, 32)
    assert [record.getMessage() for record in caplog.records] == [
        "a.png is 12x16, smaller than the size 32x32: such images are enlarged"
    ]


def test_other_epochs_and_seeds_draw_anew(tmp_path):
    write_pictures(tmp_path)
    dataset = ImageFolder(tmp_path, 4, crop="random", resize="none")
    images = [dataset[draw]["image"] for draw in (SampleKey(1), SampleKey(1, epoch=1), SampleKey(1, seed=1))]
    assert torch.equal(images[0], dataset[1]["image"])
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: ImageFolder(root / "absent", 8), "absent: no such folder; set root"),
        (lambda root: ImageFolder(root / "file", 8), "is a file, not a folder"),
        (lambda root: ImageFolder(root, 8), "no images"),
        (lambda root: ImageFolder(root, 8, list_file="absent.txt"), "absent.txt: cannot be read"),
        (lambda root: ImageFolder(root, 8, repeats=0), "repeats 0"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, make, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_texts_need_a_text(tmp_path):
    write_pictures(tmp_path)
    with pytest.raises(UserError, match="a.png has no text under 'caption'"):
        next(ImageFolder(tmp_path, 8).texts())
