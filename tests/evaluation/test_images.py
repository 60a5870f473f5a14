"""Images as bytes: grids, colours, boxes, and the folder of samples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from ldm.images import ImageWriter, colour_classes, draw_boxes, image_grid, palette, side_by_side, to_pil


def test_grid_is_filled_row_by_row():
    numbers = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    assert image_grid(numbers, 3).tolist() == [[[0, 1, 2], [3, 4, 0]]]
    assert image_grid(numbers, 9).shape == (1, 1, 5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_keep_their_bytes(channels, mode):
    image = torch.randint(0, 256, (channels, 4, 6), dtype=torch.uint8)
    converted = to_pil(image)
    assert (converted.mode, converted.size) == (mode, (6, 4))
    assert np.array_equal(np.asarray(converted).reshape(4, 6, channels), image.permute(1, 2, 0).numpy())


def test_other_channels_are_refused():
    with pytest.raises(UserError, match="image of 2 channels"):
        to_pil(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00007.png").write_bytes(b"")
    (tmp_path / "grid-0002.json").write_text("{}")
    folder = ImageWriter(tmp_path)
    for seed in (1, 2):
        folder.add(torch.full((3, 4, 4), 255, dtype=torch.uint8), {"seed": seed})
    record = folder.finish({"scale": 3.0, "sampler": {"s_tmax": float("inf")}})
    assert record.name == "grid-0003.json"
    content = json.loads(record.read_text())
    assert content["sampler"] == {"s_tmax": "inf"}  # JSON has no infinity
    assert content["scale"] == 3.0 and {"time", "command", "versions"} <= set(content)
    expected = [{"file": "samples/00008.png", "seed": 1}, {"file": "samples/00009.png", "seed": 2}]
    assert content["samples"] == expected
    assert (np.asarray(Image.open(tmp_path / "samples" / "00008.png")) == 255).all()


def test_grid_shows_the_first_images_only(tmp_path):
    folder = ImageWriter(tmp_path, columns=2, grid_limit=2)
    for _ in range(3):
        folder.add(torch.full((3, 4, 4), 255, dtype=torch.uint8), {})
    folder.finish({})
    assert Image.open(tmp_path / "grid-0000.png").size == (8, 4)


def test_images_with_names_are_shown_next_to_their_sources(tmp_path):
    folder = ImageWriter(tmp_path, columns=1)
    for size in ((4, 6), (2, 3)):
        image, source = torch.full((3, *size), 9, dtype=torch.uint8), torch.full((1, *size), 5, dtype=torch.uint8)
        folder.add(image, {}, "sub/a", source)
    folder.finish({})
    assert [entry["file"] for entry in folder.entries] == ["sub/a.png", "sub/a-1.png"]
    rows = np.asarray(Image.open(tmp_path / "grid-0000.png"))
    assert rows.shape == (8, 12, 3)
    assert (rows[:4, :6] == 5).all() and (rows[:4, 6:] == 9).all() and (rows[6:] == 0).all()


def test_extreme_images_are_left_out_of_a_grid_and_that_is_told(tmp_path, caplog):
    folder = ImageWriter(tmp_path, columns=2)
    for size in ((2, 20000), (20000, 2), (4, 4)):  # whose grid would have 800 million pixels
        folder.add(torch.zeros(1, *size, dtype=torch.uint8), {})
    with caplog.at_level("INFO"):
        assert len(json.loads(folder.finish({}).read_text())["samples"]) == 3
    assert Image.open(tmp_path / "grid-0000.png").size == (40000, 4)
    assert "leaves out 1 images" in caplog.text


def test_other_channels_become_arrays(tmp_path):
    folder = ImageWriter(tmp_path)
    image = torch.randint(0, 256, (5, 4, 6), dtype=torch.uint8)
    folder.add(image, {})
    folder.finish({})
    assert np.array_equal(np.load(tmp_path / "samples" / "00000.npy"), image.permute(1, 2, 0).numpy())
    assert Image.open(tmp_path / "grid-0000.png").size == (30, 4)


def test_opaque_images_become_transparent_ones_in_one_row():
    grey, colour, clear = (torch.full((channels, 2, 2), 9, dtype=torch.uint8) for channels in (1, 3, 4))
    row = side_by_side([grey, colour, clear])
    assert row.shape == (4, 2, 6) and row[:3].eq(9).all()
    assert row[3, 0].tolist() == [255, 255, 255, 255, 9, 9]


def test_every_class_has_a_colour_of_its_own_and_none_is_black():
    colours = palette(20)
    assert colours.shape == (20, 3) and len({tuple(colour) for colour in colours.tolist()}) == 20
    shown = colour_classes(torch.tensor([[0, 1], [-1, 2]]), num_classes=20)
    assert shown.shape == (3, 2, 2) and shown[:, 1, 0].tolist() == [0, 0, 0] and colours.sum(1).min() > 0
    assert shown[:, 1, 1].tolist() == colours[2].tolist()


def test_boxes_are_outlined_in_their_colours():
    image = draw_boxes([(0, 0, 1, 1), (0.25, 0.25, 0.5, 0.5)], (17, 33), colours=[(9, 8, 7), (1, 2, 3)])
    assert image.shape == (3, 17, 33) and image[:, 0, 5].tolist() == [9, 8, 7]
    assert image[:, 4, 10].tolist() == [1, 2, 3] and image[:, 8, 16].tolist() == [255, 255, 255]
