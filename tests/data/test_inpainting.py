import logging
import pickle

import numpy as np
import pytest
import torch
from picture_files import pixels, write_pictures
from PIL import Image

from ldm.data.core.transforms import SampleKey
from ldm.data.image_pairs.inpainting import Masked, MaskedFolder
from ldm.data.readers.folders import ImageFolder
from ldm.data.shards.shards import Shards
from ldm.errors import UserError
from ldm.toy.shapes import Shapes


def test_the_hole_is_minus_one_and_the_rest_untouched(tmp_path):
    write_pictures(tmp_path)
    for item in Masked(ImageFolder(tmp_path, 8)):
        assert item["mask"].shape == (1, 8, 8) and set(item["mask"].unique().tolist()) == {-1.0, 1.0}
        hole = (item["mask"] > 0).expand(3, -1, -1)
        assert (item["masked_image"][hole] == -1).all()
        assert torch.equal(item["masked_image"][~hole], item["image"][~hole])


def test_masks_are_functions_of_seed_epoch_and_index(tmp_path):
    write_pictures(tmp_path)
    dataset = Masked(ImageFolder(tmp_path, 16, crop="random", resize="none"), "thick")
    for draw in (SampleKey(1), SampleKey(1, epoch=1), SampleKey(2), SampleKey(1, seed=1)):
        first, second = dataset[draw], pickle.loads(pickle.dumps(dataset))[draw]
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert torch.equal(first["image"], dataset.dataset[draw]["image"])
    keys = SampleKey(1), SampleKey(1, epoch=1), SampleKey(2), SampleKey(1, seed=1)
    masks = [dataset[key]["mask"] for key in keys]
    assert not any(torch.equal(masks[0], other) for other in masks[1:])


def test_generated_scenes_keep_their_keys():
    item = Masked(Shapes(4, 16))[SampleKey(2, epoch=5)]
    assert {"caption", "mask", "masked_image"} <= item.keys()
    assert torch.equal(item["image"], Shapes(4, 16)[2]["image"])


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="masks 'fat' is not one of mixed, thick"):
        Masked(Shapes(1, 16), "fat")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="Shards has no positions; use a map-style data set"):
        Masked(Shards(tmp_path, 8))
    with pytest.raises(UserError, match="the items have no 'image', they have caption"):
        Masked([{"caption": "x"}])[0]


def write_masked(root, count=3):
    for i in range(count):
        picture, mask = pixels(i), np.zeros((12, 16), np.uint8)
        mask[3:7, 2:9] = 255 - i  # more than middle grey
        picture[mask > 0] = 255
        Image.fromarray(picture).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_mask.png")


def test_mask_files_get_the_crop_and_the_mirroring(tmp_path):
    write_masked(tmp_path)
    dataset = MaskedFolder(tmp_path, 8, tmp_path, "_mask", crop="random", resize="none", flip=0.5)
    assert dataset.names == ["0.png", "1.png", "2.png"]
    for epoch in range(5):
        for i in range(3):
            item = dataset[SampleKey(i, epoch)]
            hole = item["mask"] > 0
            assert hole.any() and (item["image"][hole.expand(3, -1, -1)] == 1).all()
            assert (item["masked_image"][hole.expand(3, -1, -1)] == -1).all()
            assert torch.equal(item["mask"], hole.float() * 2 - 1)


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "P", "JPEG"])
def test_kinds_of_mask_files(tmp_path, mode):
    (tmp_path / "masks").mkdir()
    Image.fromarray(pixels(0, 16, 16)).save(tmp_path / "a.png")
    mask = Image.fromarray(np.kron([[0, 255], [0, 0]], np.ones((8, 8))).astype(np.uint8))
    if mode == "JPEG":
        mask.save(tmp_path / "masks" / "a.jpg")
    else:
        mask.convert(mode).save(tmp_path / "masks" / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
    item = MaskedFolder(tmp_path / "images", 16, tmp_path / "masks")[0]
    want = torch.full((16, 16), -1.0)
    want[:8, 8:] = 1
    assert torch.equal(item["mask"][0], want)


def test_masks_without_a_hole_are_counted_and_the_first_named(tmp_path, caplog):
    write_masked(tmp_path)
    for i in (1, 2):
        Image.new("L", (16, 12)).save(tmp_path / f"{i}_mask.png")
    dataset = MaskedFolder(tmp_path, 8, tmp_path, "_mask")
    with caplog.at_level(logging.WARNING):
        assert [bool((item["mask"] > 0).any()) for item in dataset] == [True, False, False]
    assert dataset.errors.num_empty == 2
    (record,) = [record for record in caplog.records if "hole" in record.getMessage()]
    assert record.getMessage().startswith(f"1.png: {tmp_path / '1_mask.png'}: a mask without a hole")


def test_masks_of_another_size_are_scaled_and_of_another_shape_skipped(tmp_path, caplog):
    write_masked(tmp_path)
    with Image.open(tmp_path / "0_mask.png") as mask:
        larger = mask.resize((32, 24), Image.Resampling.NEAREST)
    before = MaskedFolder(tmp_path, 8, tmp_path, "_mask")[0]["mask"]
    larger.save(tmp_path / "0_mask.png")
    Image.new("L", (12, 16)).save(tmp_path / "1_mask.png")
    dataset = MaskedFolder(tmp_path, 8, tmp_path, "_mask")
    assert torch.equal(dataset[0]["mask"], before)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(dataset[1]["image"], dataset[2]["image"])
    assert "1.png cannot be read and is skipped" in caplog.text
    assert all(text in caplog.text for text in ("1_mask.png: ", "16x12", "12x16"))
