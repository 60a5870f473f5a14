import io
import struct
import zlib

import numpy as np
import pytest
import torch
from picture_files import pixels, png
from PIL import Image

from ldm.data.core.decoding import UNREADABLE, MultichannelImage, open_image
from ldm.data.core.transforms import ImageTransform, with_channels
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError


def rng():
    return np.random.default_rng(0)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png16(array, colour_type):
    """Write 16 bits a channel, which PIL cannot: rows of (left neighbour's difference) so that filters are used."""
    height, width = array.shape[:2]
    values = array.astype(">u2").reshape(height, -1).view(np.uint8)
    step = 2 * (array.size // (height * width))
    left = np.pad(values, ((0, 0), (step, 0)))[:, : values.shape[1]]
    rows = b"".join(b"\1" + row.tobytes() for row in (values - left).astype(np.uint8))

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep(channels, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, (6, 5, channels)).astype(np.uint16)


def shown(content, channels, **options):
    return ImageTransform([6, 5], channels=channels, **options)(
        open_image(content, channels, options.get("value_range")), rng()
    )


def expected(array, high):
    return torch.from_numpy(array.astype(np.float64) / high * 2 - 1).permute(2, 0, 1).float()


@pytest.mark.parametrize(("channels", "colour_type"), [(3, 2), (4, 6), (2, 4)])
def test_sixteen_bit_colours_keep_their_precision(channels, colour_type):
    array = deep(channels)
    torch.testing.assert_close(shown(png16(array, colour_type), channels), expected(array, 65535), atol=1e-6, rtol=0)


def test_sixteen_bit_transparency_is_laid_on_white():
    array = deep(4)
    alpha = array[..., 3:].astype(np.float64) / 65535
    want = expected(array[..., :3] * alpha + 65535 * (1 - alpha), 65535)
    torch.testing.assert_close(shown(png16(array, 6), 3), want, atol=1e-5, rtol=0)
    grey = shown(png16(deep(2), 4), 1)
    assert grey.shape == (1, 6, 5)


def test_sixteen_bit_colours_become_grey():
    array = deep(3)
    want = expected(array @ np.array([[0.299], [0.587], [0.114]]), 65535)
    torch.testing.assert_close(shown(png16(array, 2), 1), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize(("dtype", "high"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
def test_arrays_of_any_number_of_channels(channels, dtype, high):
    array = (rng().random((6, 5, channels)) * high).astype(dtype)
    got = shown(npy(array), channels)
    assert got.shape == (channels, 6, 5) and got.dtype == torch.float32
    torch.testing.assert_close(got, expected(array, high), atol=1e-6, rtol=0)


@pytest.mark.parametrize("crop", ["center", "random", "none"])
def test_arrays_are_scaled_cropped_and_mirrored_like_images(crop):
    colours = pixels(0, 24, 40)
    options = {"crop": crop, "flip": 1.0}
    from_array = ImageTransform([8, 12], **options)(open_image(npy(colours)), rng())
    from_picture = ImageTransform([8, 12], **options)(open_image(png(colours)), rng())
    torch.testing.assert_close(from_array, from_picture, atol=0.02, rtol=0)  # PIL rounds images to bytes


def test_range_of_values():
    array = np.array([[[0.0], [100.0], [400.0], [500.0]]])
    got = ImageTransform([1, 4], channels=1, value_range=[0, 400])(open_image(npy(array), 1, (0, 400)), rng())
    torch.testing.assert_close(got.flatten(), torch.tensor([-1.0, -0.5, 1.0, 1.0]))
    twelve_bits = png(np.array([[0, 4095]], np.uint16))
    got = ImageTransform([1, 2], channels=1)(open_image(twelve_bits, 1, (0, 4095)), rng())
    assert got.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"float64 of shape \[4\]"),
        (np.zeros((2, 2, 2, 2)), r"\[2, 2, 2, 2\]"),
        (np.zeros((0, 4)), r"\[0, 4\]"),
        (np.full((2, 2), 3.0), r"3\.\.3 have no known range; set value_range"),
        (np.full((2, 2), 7, np.int32), "no known range"),
        (np.full((2, 2), np.nan), "not finite"),
        (np.array([[None]]), "allow_pickle"),
    ],
)
def test_arrays_that_are_no_images_are_unreadable(array, message):
    with pytest.raises(UNREADABLE, match=message):
        open_image(npy(array))


def test_transparency_is_kept_where_it_is_wanted():
    array = pixels(0)
    translucent = np.concatenate([array, array[..., :1]], axis=-1)
    got = ImageTransform([12, 16], channels=4)(open_image(png(translucent), 4), rng())
    torch.testing.assert_close(got, expected(translucent, 255))
    opaque = ImageTransform([12, 16], channels=4)(open_image(png(array), 4), rng())
    assert torch.equal(opaque[3], torch.ones(12, 16))


@pytest.mark.parametrize("have", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [2, 4])
def test_sixteen_bits_get_the_alpha_that_is_wanted(have, channels):
    array = deep(have)
    got = shown(png16(array, {1: 0, 2: 4, 3: 2, 4: 6}[have]), channels)
    assert got.shape == (channels, 6, 5)
    alpha = expected(array[..., -1:], 65535) if have in (2, 4) else torch.ones(1, 6, 5)
    torch.testing.assert_close(got[-1:], alpha, atol=1e-6, rtol=0)
    if channels == 4:
        colours = expected(array[..., : 3 if have > 2 else 1], 65535).expand(3, 6, 5)
        torch.testing.assert_close(got[:3], colours, atol=1e-6, rtol=0)


def test_other_numbers_of_channels_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 5), np.uint8))
    with pytest.raises(UserError, match=r"^a.npy: an image of 5 channels does not go with channels=3; set channels=5"):
        ImageFolder(tmp_path, 8)[0]
    assert ImageFolder(tmp_path, 8, channels=5)[0]["image"].shape == (5, 8, 8)
    with pytest.raises(UserError, match="does not go with channels=5"):
        with_channels(Image.new("L", (4, 4)), 5)


def test_arrays_beside_images_are_not_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png(pixels(0)))
    np.save(tmp_path / "a.npy", np.zeros(512))
    assert ImageFolder(tmp_path, 8).names == ["a.png"]


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        ((6, 5, 5), {"photometric": "minisblack", "planarconfig": "contig"}, np.uint16),
        ((5, 6, 5), {"photometric": "minisblack"}, np.uint8),
        ((6, 5, 3), {"photometric": "rgb"}, np.uint16),
        ((6, 5, 5), {"photometric": "minisblack", "planarconfig": "contig"}, np.float32),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_tiff_beyond_pillow(shape, options, dtype):
    tifffile = pytest.importorskip("tifffile")
    high = 1 if dtype is np.float32 else np.iinfo(dtype).max
    array = (rng().random(shape) * high).astype(dtype)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    want = array if shape[:2] == (6, 5) else np.moveaxis(array, 0, -1)  # pages become channels
    got = shown(buffer.getvalue(), want.shape[-1])
    torch.testing.assert_close(got, expected(want, high), atol=1e-6, rtol=0)
    for length in (6, 20, 60, len(buffer.getvalue()) - 40):
        with pytest.raises(UNREADABLE):
            open_image(buffer.getvalue()[:length], want.shape[-1])


def tiff(array, **options):
    buffer = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(buffer, array, planarconfig="contig", **options)
    return buffer.getvalue()


UNSPECIFIED, UNASSOCIATED = 0, 2  # kinds of extra samples


@pytest.mark.parametrize(
    ("channels", "photometric", "extra"),
    [(4, "rgb", [UNSPECIFIED]), (2, "minisblack", None), (4, "minisblack", None), (4, "minisblack", [0, 0, 2])],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_extra_samples_of_tiff_are_channels(channels, photometric, extra, dtype):
    high = np.iinfo(dtype).max
    array = rng().integers(0, high, (6, 5, channels), dtype)
    content = tiff(array, photometric=photometric, extrasamples=extra)
    torch.testing.assert_close(shown(content, channels), expected(array, high), atol=1e-6, rtol=0)
    if photometric == "rgb":  # is no alpha, so that nothing is laid on white
        torch.testing.assert_close(shown(content, 3), expected(array[..., :3], high), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("channels", "photometric"), [(4, "rgb"), (2, "minisblack")])
def test_alpha_of_tiff_is_laid_on_white(channels, photometric, dtype):
    high = np.iinfo(dtype).max
    array = rng().integers(0, high, (6, 5, channels), dtype)
    content = tiff(array, photometric=photometric, extrasamples=[UNASSOCIATED])
    alpha = array[..., -1:] / high
    want = expected(array[..., :-1] * alpha + high * (1 - alpha), high).expand(3, -1, -1)
    torch.testing.assert_close(shown(content, 3), want, atol=0.01, rtol=0)


def test_ordinary_tiff():
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).save(buffer, "TIFF")
    assert open_image(buffer.getvalue()).mode == "RGB"


def test_planes_know_their_size():
    planes = MultichannelImage.of(np.zeros((6, 5, 7), np.float32))
    assert (planes.width, planes.height, planes.size, len(planes.getbands())) == (5, 6, (5, 6), 7)
    assert planes.array().shape == (6, 5, 7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow_whoever_decodes(orientation):
    tifffile = pytest.importorskip("tifffile")
    small = np.arange(30, dtype=np.uint8).reshape(6, 5)
    exif, turned = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(small).save(turned, "PNG", exif=exif)
    want = np.asarray(open_image(turned.getvalue(), 1))
    wide, buffer = np.repeat(small[..., None], 5, axis=-1), io.BytesIO()
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(buffer, wide, photometric="minisblack", planarconfig="contig", extratags=tag)
    assert np.array_equal(open_image(buffer.getvalue(), 5).array()[..., 0], want)
    content = png16((np.repeat(small[..., None], 3, axis=-1) * np.uint16(257)), 2)
    exif_chunk = exif.tobytes().removeprefix(b"Exif\0\0")
    body = struct.pack(">I", len(exif_chunk)) + b"eXIf" + exif_chunk
    body += struct.pack(">I", zlib.crc32(b"eXIf" + exif_chunk))
    deep_image = open_image(content[:33] + body + content[33:], 3)
    assert np.allclose(deep_image.array()[..., 0], want, atol=1e-3)
