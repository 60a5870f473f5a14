"""Files that visitors send: what is no image, or too large, is refused before a pixel is decoded."""

import base64
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from picture_files import address, png
from PIL import Image
from tiny_runs import noise

from ldm.errors import UserError
from ldm.serve.uploads import LARGEST_SIDE, Upload, fitted_image, hole_of, image_of, indices_of


def of(content, field="image"):
    return Upload.of(field, "data:;base64," + base64.b64encode(content).decode())


def bomb(width, height):
    """Return a PNG of a few bytes that says it is as large."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(kind, array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind, **options)
    return buffer.getvalue()


def array_file():
    buffer = io.BytesIO()
    np.save(buffer, noise(8, 8))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no image"),
        (b"no image", "no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
        (b"%PDF-1.4", "no image"),
        (array_file(), "no image"),
        (saved("TIFF", noise(8, 8)), "no image"),
        (bomb(LARGEST_SIDE + 1, 1), f"{LARGEST_SIDE + 1} x 1 pixels; at most {LARGEST_SIDE}"),
        (bomb(60_000, 60_000), "damaged, or too large"),
        (bomb(2**31 - 1, 2**31 - 1), "damaged, or too large"),
    ],
)
def test_what_is_no_image_or_too_large_is_refused_by_its_header(content, named):
    tracemalloc.start()
    with pytest.raises(UserError, match="^image: ") as caught:
        of(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert named in str(caught.value) and peak < 2**22


@pytest.mark.parametrize("text", ["data:image/png;base64,????", "no address", "data:;base64,A"])
def test_addresses_that_are_none(text):
    with pytest.raises(UserError, match="^mask: "):
        Upload.of("mask", text)


@pytest.mark.parametrize("content", [png(noise(16, 16))[:-60], bomb(16, 16)])
def test_images_that_end_too_early_are_told(content):
    upload = of(content)
    for read in (lambda: image_of(upload, 3), lambda: fitted_image(upload, 3, (8, 8))):
        with pytest.raises(UserError, match="^image: the file is damaged"):
            read()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_what_browsers_show_is_read(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    flat = np.full((9, 7, 3), 120, np.uint8)
    image = image_of(of(saved(kind, flat, **options)), 3)
    assert image.shape == (3, 9, 7) and (image.int() - 120).abs().max() <= 2


def test_images_are_scaled_and_cropped_as_data_sets_do():
    image = fitted_image(of(png(noise(40, 20))), 3, (16, 16))
    assert image.shape == (3, 16, 16)
    assert fitted_image(of(png(noise(40, 20))), 1, (8, 16)).shape == (1, 8, 16)
    exact = noise(16, 16)
    assert np.array_equal(fitted_image(of(png(exact)), 3, (16, 16)).permute(1, 2, 0), exact)


def test_holes():
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    assert np.array_equal(hole_of(of(png(mask), "mask"), (8, 8))[0], mask > 0)
    for wrong, named in ((np.zeros_like(mask), "without a hole"), (mask[:4], "its image 8x8")):
        with pytest.raises(UserError, match=f"^mask: .*{named}"):
            hole_of(of(png(wrong), "mask"), (8, 8))


def test_maps_of_files_and_of_a_browser_are_read_alike():
    indices = noise(6, 5, 1) % 4
    painted = np.dstack([indices, indices, indices, np.full_like(indices, 255)])
    palette = Image.fromarray(indices, "P")
    palette.putpalette([9, 90, 200] * 4)
    buffer = io.BytesIO()
    palette.save(buffer, format="png")
    for content in (png(indices), png(painted), buffer.getvalue()):
        assert np.array_equal(indices_of(of(content, "map")), indices)
    with pytest.raises(UserError, match="^map: .*mode RGB"):
        indices_of(of(png(noise(6, 5)), "map"))
    with pytest.raises(UserError, match="^map: .*JPEG changes indices"):
        indices_of(of(saved("JPEG", indices), "map"))


def test_an_address_of_a_browser_is_read():
    assert image_of(Upload.of("image", address(png(noise(4, 4)))), 3).shape == (3, 4, 4)
