import numpy as np
import pytest
import torch
from picture_files import write_pictures
from PIL import Image

from ldm.data.core.transforms import SampleKey
from ldm.data.image_pairs.degradation import bsrgan, bsrgan_light
from ldm.data.image_pairs.super_resolution import LowRes
from ldm.data.readers.folders import ImageFolder
from ldm.errors import UserError
from ldm.toy.shapes import Shapes


def folder(root, size=(24, 32), **options):
    write_pictures(root, 3, height=40, width=48)
    return ImageFolder(root, list(size), **options)


def to_bytes(image):
    return ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_bicubic_is_that_of_pil(tmp_path, factor):
    for item in LowRes(folder(tmp_path), factor):
        height, width = 24 // factor, 32 // factor
        want = Image.fromarray(to_bytes(item["image"])).resize((width, height), Image.Resampling.BICUBIC)
        assert item["low_res"].shape == (3, height, width) and item["low_res"].dtype == torch.float32
        assert np.abs(to_bytes(item["low_res"]).astype(int) - np.asarray(want).astype(int)).max() <= 1


def test_the_image_itself_is_untouched(tmp_path):
    plain = folder(tmp_path, crop="random", resize="none", flip=0.5)
    for draw in (SampleKey(0), SampleKey(1, 3), SampleKey(2, 0, 7)):
        assert torch.equal(LowRes(plain)[draw]["image"], plain[draw]["image"])


@pytest.mark.parametrize("recipe", [bsrgan, bsrgan_light])
def test_degradations_are_functions_of_the_draw(recipe):
    pytest.importorskip("cv2")
    dataset = LowRes(Shapes(3, 32), 4, recipe(4))
    low = [dataset[draw]["low_res"] for draw in (SampleKey(0), SampleKey(0), SampleKey(0, epoch=1), SampleKey(1))]
    assert low[0].shape == (3, 8, 8) and low[0].min() >= -1 and low[0].max() <= 1
    assert torch.equal(low[0], low[1])
    assert not torch.equal(low[0], low[2]) and not torch.equal(low[0], low[3])


def test_values_are_those_of_bytes(tmp_path):
    low = LowRes(folder(tmp_path))[0]["low_res"]
    steps = (low + 1) * 127.5
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


def test_grey_images_can_be_shrunk(tmp_path):
    dataset = folder(tmp_path, channels=1)
    assert LowRes(dataset)[0]["low_res"].shape == (1, 6, 8)
    with pytest.raises(UserError, match="the degradation needs 3 channels, not 1"):
        LowRes(dataset, 4, bsrgan_light(4))[0]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="factor 4 must be positive, and that of the degradation"):
        LowRes(Shapes(1, 16), 4, bsrgan_light(2))
    with pytest.raises(UserError, match="factor 3 does not divide images of 16x16; change size"):
        LowRes(Shapes(1, 16), 3)[0]
