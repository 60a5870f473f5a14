import io

import numpy as np
import pytest
import torch
from picture_files import pixels, png
from PIL import Image

from ldm.data.core.transforms import UNREADABLE, ImageTransform, SampleKey, open_image
from ldm.errors import UserError


def rng(seed=0):
    return np.random.default_rng(seed)


def opened(array):
    return open_image(png(array))


def test_draws_differ_in_every_part_and_repeat():
    draws = [SampleKey(0, 0, 0), SampleKey(1, 0, 0), SampleKey(0, 1, 0), SampleKey(0, 0, 1)]
    values = [draw.generator().random() for draw in draws]
    assert len(set(values)) == 4
    assert values == [draw.generator().random() for draw in draws]


def test_same_size_is_exact():
    array = pixels(1)
    got = ImageTransform([12, 16])(opened(array), rng())
    want = torch.from_numpy(array.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("crop", ["center", "random", "none"])
@pytest.mark.parametrize("size", [5, [4, 9], [9, 4], [30, 40]])
def test_sizes(crop, size):
    got = ImageTransform(size, crop)(opened(pixels(0)), rng())
    assert got.shape == (3, *([size, size] if isinstance(size, int) else size))
    assert got.min() >= -1 and got.max() <= 1


def test_center_crop_at_full_resolution_is_the_middle():
    array = pixels(2)
    got = ImageTransform([6, 8], "center", resize="none")(opened(array), rng())
    want = array[3:9, 4:12]
    assert torch.equal(got, torch.from_numpy(want.astype(np.float32) / 127.5 - 1).permute(2, 0, 1))


def test_random_crops_reach_every_place_alike():
    array = np.zeros((1, 8, 3), np.uint8)
    array[0, :, 0] = np.arange(8)
    image, transform = opened(array), ImageTransform([1, 4], "random", resize="none")
    places = [round(float((transform(image, rng(i))[0, 0, 0] + 1) * 127.5)) for i in range(500)]
    counts = np.bincount(places)
    assert len(counts) == 5 and counts.min() > 60


def test_resize_gives_the_shortest_side_before_the_crop():
    gradient = np.repeat(np.linspace(0, 250, 64)[None, :, None], 32, axis=0).repeat(3, axis=2).astype(np.uint8)
    whole = ImageTransform([8, 16], "center")(opened(gradient), rng())
    part = ImageTransform([8, 16], "center", resize=16)(opened(gradient), rng())
    spread = (whole[0, 0, -1] - whole[0, 0, 0]) / (part[0, 0, -1] - part[0, 0, 0])
    assert 1.8 < spread < 2.3


def test_shrinking_is_antialiased():
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    got = ImageTransform(8)(opened(stripes), rng())
    assert got.abs().max() < 0.1


def test_flip_mirrors_and_leaves_the_crop_alone():
    image = opened(pixels(3))
    plain, mirrored = (ImageTransform(8, "random", flip=p)(image, rng(7)) for p in (0.0, 1.0))
    assert torch.equal(plain, mirrored.flip(-1))


def test_transparency_is_laid_on_white():
    array = np.zeros((4, 4, 4), np.uint8)
    array[:2, :, 3] = 255
    got = ImageTransform(4)(opened(array), rng())
    assert torch.equal(got[:, :2], torch.full((3, 2, 4), -1.0))
    assert torch.equal(got[:, 2:], torch.ones(3, 2, 4))


def test_palette_with_transparency():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    assert torch.equal(ImageTransform(4)(open_image(buffer.getvalue()), rng()), torch.ones(3, 4, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_their_precision(channels):
    array = np.array([[0, 1, 257, 32768, 65534, 65535]], np.uint16)
    got = ImageTransform([1, 6], channels=channels)(opened(array), rng())
    assert got.shape == (channels, 1, 6)
    torch.testing.assert_close(got[0, 0].double(), torch.from_numpy(array[0] / 65535.0 * 2 - 1), atol=1e-6, rtol=0)
    assert len(set(got[0, 0].tolist())) == 6


@pytest.mark.parametrize(("array", "channels"), [(pixels(0)[..., 0], 3), (pixels(0), 1)])
def test_grey_and_colour_become_the_channels_asked_for(array, channels):
    got = ImageTransform([12, 16], channels=channels)(opened(array), rng())
    assert got.shape == (channels, 12, 16)
    if channels == 3:
        assert torch.equal(got[0], got[2])


def test_orientation_of_the_camera_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).save(buffer, "JPEG", exif=exif)
    assert open_image(buffer.getvalue()).size == (12, 16)


@pytest.mark.parametrize("content", [b"", b"no picture", png(pixels(0))[:60]])
def test_damaged_files_raise_what_readers_skip(content):
    with pytest.raises(UNREADABLE):
        open_image(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size 0 is neither"),
        ({"size": [8]}, r"size \[8\]"),
        ({"crop": "middle"}, "crop 'middle' is not one of center, random, random_size, random_half, none"),
        ({"interpolation": "cubic"}, "interpolation 'cubic'"),
        ({"resize": 4}, "from 8 on"),
        ({"resize": "all"}, "resize 'all'"),
        ({"flip": 2}, "flip=2"),
        ({"channels": 0}, "channels=0"),
        ({"channels": 2.5}, "channels=2.5"),
        ({"value_range": [4, 4]}, r"value_range \[4, 4\] is not \[low, high\]"),
        ({"value_range": 255}, "value_range 255"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ImageTransform(**{"size": 8, **options})
