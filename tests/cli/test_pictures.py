"""The folder of samples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.pictures import PictureFolder, grid, side_by_side, to_picture
from ldm.errors import UserError


def test_grid_is_filled_row_by_row():
    numbers = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    assert grid(numbers, 3).tolist() == [[[0, 1, 2], [3, 4, 0]]]
    assert grid(numbers, 9).shape == (1, 1, 5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_keep_their_bytes(channels, mode):
    image = torch.randint(0, 256, (channels, 4, 6), dtype=torch.uint8)
    picture = to_picture(image)
    assert (picture.mode, picture.size) == (mode, (6, 4))
    assert np.array_equal(np.asarray(picture).reshape(4, 6, channels), image.permute(1, 2, 0).numpy())


def test_other_channels_are_refused():
    with pytest.raises(UserError, match="picture of 2 channels"):
        to_picture(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00007.png").write_bytes(b"")
    (tmp_path / "grid-0002.json").write_text("{}")
    folder = PictureFolder(tmp_path)
    folder.add(torch.ones(2, 3, 4, 4), [{"seed": 1}, {"seed": 2}])
    record = folder.finish({"scale": 3.0})
    assert record.name == "grid-0003.json"
    content = json.loads(record.read_text())
    assert content["scale"] == 3.0 and {"time", "command", "versions"} <= set(content)
    expected = [{"file": "samples/00008.png", "seed": 1}, {"file": "samples/00009.png", "seed": 2}]
    assert content["samples"] == expected
    assert (np.asarray(Image.open(tmp_path / "samples" / "00008.png")) == 255).all()


def test_grid_shows_the_first_pictures_only(tmp_path):
    folder = PictureFolder(tmp_path, columns=2, grid_limit=2)
    folder.add(torch.ones(3, 3, 4, 4), [{}] * 3)
    folder.finish({})
    assert Image.open(tmp_path / "grid-0000.png").size == (8, 4)


def test_pictures_with_names_and_what_stands_beside_them(tmp_path):
    folder = PictureFolder(tmp_path, columns=1)
    for size in ((4, 6), (2, 3)):
        image, beside = torch.full((3, *size), 9, dtype=torch.uint8), torch.full((1, *size), 5, dtype=torch.uint8)
        folder.add_one(image, {}, "sub/a", beside)
    folder.finish({})
    assert [entry["file"] for entry in folder.entries] == ["sub/a.png", "sub/a-1.png"]
    rows = np.asarray(Image.open(tmp_path / "grid-0000.png"))
    assert rows.shape == (8, 12, 3)
    assert (rows[:4, :6] == 5).all() and (rows[:4, 6:] == 9).all() and (rows[6:] == 0).all()


def test_other_channels_become_arrays(tmp_path):
    folder = PictureFolder(tmp_path)
    image = torch.randint(0, 256, (5, 4, 6), dtype=torch.uint8)
    folder.add_one(image, {})
    folder.finish({})
    assert np.array_equal(np.load(tmp_path / "samples" / "00000.npy"), image.permute(1, 2, 0).numpy())
    assert Image.open(tmp_path / "grid-0000.png").size == (30, 4)


def test_opaque_pictures_stand_beside_transparent_ones():
    grey, colour, clear = (torch.full((channels, 2, 2), 9, dtype=torch.uint8) for channels in (1, 3, 4))
    row = side_by_side([grey, colour, clear])
    assert row.shape == (4, 2, 6) and row[:3].eq(9).all()
    assert row[3, 0].tolist() == [255, 255, 255, 255, 9, 9]
