"""Images, masks and maps from files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli.inputs import Source, list_images, readable
from ldm.data.readers.single_images import cropped, describe_loss, padded, read_image, read_indices, read_mask
from ldm.errors import UserError


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_images_keep_their_bytes_and_take_the_channels_asked_for(tmp_path):
    colours = np.random.RandomState(0).randint(0, 256, (5, 7, 3)).astype(np.uint8)
    file = save(tmp_path / "a.png", colours)
    assert np.array_equal(read_image(file, 3).permute(1, 2, 0).numpy(), colours)
    assert read_image(file, 1).shape == (1, 5, 7)
    assert read_image(file, 3, (10, None)).shape == (3, 10, 7)
    assert read_image(file, 4).shape == (4, 5, 7)
    with pytest.raises(UserError, match="a.png: .*3 channels .*channels=5"):
        read_image(file, 5)


def test_arrays_have_any_number_of_channels(tmp_path):
    planes = np.random.RandomState(0).randint(0, 256, (5, 7, 6)).astype(np.uint8)
    np.save(tmp_path / "a.npy", planes)
    assert np.array_equal(read_image(tmp_path / "a.npy", 6).permute(1, 2, 0).numpy(), planes)


def test_sixteen_bits_become_eight_and_transparency_white(tmp_path):
    wide = np.array([[0, 65535, 32896]], dtype=np.uint16)
    assert read_image(save(tmp_path / "a.png", wide), 1).flatten().tolist() == [0, 255, 128]
    clear = np.zeros((1, 1, 4), dtype=np.uint8)
    assert read_image(save(tmp_path / "b.png", clear), 3).flatten().tolist() == [255, 255, 255]


def test_a_value_range_says_what_is_black_and_white(tmp_path):
    twelve_bits = save(tmp_path / "a.png", np.array([[0, 4095]], dtype=np.uint16))
    assert read_image(twelve_bits, 1, value_range=(0, 4095)).flatten().tolist() == [0, 255]
    np.save(tmp_path / "a.npy", np.array([[-1000.0, 3000.0, 5000.0]], np.float32))
    assert read_image(tmp_path / "a.npy", 1, value_range=(-1000, 3000)).flatten().tolist() == [0, 255, 255]
    with pytest.raises(ValueError, match="value_range"):
        read_image(tmp_path / "a.npy", 1)


def test_what_bytes_cannot_keep(tmp_path):
    whole = np.full((2, 2, 4), 255, np.uint8)
    clear = whole.copy()
    clear[0, 0, 3] = 254
    files = {
        "grey": np.zeros((2, 2), np.uint8), "opaque": whole, "clear": clear,
        "deep": np.array([[1, 2]], np.uint16), "wide": np.array([[257, 514]], np.uint16),
    }  # fmt: skip
    lost = {name: describe_loss(save(tmp_path / f"{name}.png", array), 3) for name, array in files.items()}
    assert [name for name, loss in lost.items() if loss] == ["clear", "deep"]
    assert "transparent" in lost["clear"] and "more than 8 bits" in lost["deep"]
    assert describe_loss(tmp_path / "clear.png", 4) is None


def palette(path, indices):
    image = Image.fromarray(np.array(indices, np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 0, 0, 60, 90, 0, 0])
    image.save(path)
    return path


def test_masks_of_zero_and_one_of_palettes_and_of_16_bits(tmp_path):
    hole = [[[False, True, True]]]
    assert read_mask(save(tmp_path / "a.png", np.array([[0, 1, 1]], np.uint8)), (1, 3)).tolist() == hole
    assert read_mask(palette(tmp_path / "b.png", [[0, 1, 2]]), (1, 3)).tolist() == hole
    assert read_mask(save(tmp_path / "c.png", np.array([[32767, 32768, 65535]], np.uint16)), (1, 3)).tolist() == hole
    assert read_mask(save(tmp_path / "d.png", np.array([[0, 1, 1]], np.uint16)), (1, 3)).tolist() == hole
    assert read_mask(save(tmp_path / "e.png", np.array([[False, True, True]])), (1, 3)).tolist() == hole
    assert read_mask(save(tmp_path / "f.png", np.array([[0, 1, 255]], np.uint8)), (1, 3)).sum() == 1


def test_masks_without_a_hole(tmp_path):
    message = "a mask without a hole, its values are 0 to 127; a hole is what is white .128 and more of 255."
    with pytest.raises(UserError, match=f"m.png: {message}"):
        read_mask(save(tmp_path / "m.png", np.array([[0, 127]], dtype=np.uint8)), (1, 2))
    with pytest.raises(UserError, match="m.jpg: .*1 to 1"):  # traces, not ones
        read_mask(save(tmp_path / "m.jpg", np.full((8, 8), 1, np.uint8)), (8, 8))
    with pytest.raises(UserError, match="0 to 0"):
        read_mask(palette(tmp_path / "p.png", [[0, 0]]), (1, 2))


def test_masks_are_holes_from_the_middle_on(tmp_path):
    file = save(tmp_path / "m.png", np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert read_mask(file, (1, 4)).tolist() == [[[False, False, True, True]]]
    assert read_mask(file, (1, 4), (2, None)).shape == (1, 2, 4)
    with pytest.raises(UserError, match="m.png: .*4x1.* 4x2"):
        read_mask(file, (2, 4))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_hold_indices(tmp_path, dtype):
    indices = np.array([[0, 3], [200, 7]], dtype=dtype)
    assert np.array_equal(read_indices(save(tmp_path / "a.png", indices)), indices)
    large = read_indices(tmp_path / "a.png", (4, 6))
    assert large.shape == (4, 6) and set(large.flatten().tolist()) == {0, 3, 200, 7}


def test_maps_of_one_bit(tmp_path):
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1").save(tmp_path / "a.png")
    assert read_indices(tmp_path / "a.png").tolist() == [[0, 1]]


def test_sides_are_filled_up_by_repetition_and_cut_again():
    x = torch.arange(6).view(1, 2, 3)
    assert padded(x, 4).tolist() == [[[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]]
    assert torch.equal(cropped(padded(x, 4), (2, 3)), x)
    assert torch.equal(padded(x, 1), x)


def test_listing(tmp_path):
    save(tmp_path / "b.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "a.jpg", np.zeros((2, 2), np.uint8))
    (tmp_path / "note.txt").write_text("")
    assert [source.name for source in list_images(str(tmp_path), "--indir")] == ["b", "sub/a"]
    assert list_images(str(tmp_path / "b.png"), "--indir")[0].name == "b"


def test_unreadable_files_are_counted(caplog):
    def read(source):
        if source.name != "good":
            raise OSError("truncated")
        return source.name

    good, bad = Source(Path("g.png"), "good"), Source(Path("b.png"), "bad")
    assert [value for _, value in readable([bad, good, bad], read)] == ["good"]
    assert "skipped 2 unreadable images: b.png (truncated)" in caplog.text
    with pytest.raises(UserError, match="1 images"):
        list(readable([bad], read))
