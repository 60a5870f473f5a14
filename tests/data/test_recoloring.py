import numpy as np
import pytest
import torch
from picture_files import write_pictures

from ldm.data.folders import ImageFolder
from ldm.data.recoloring import Recolored
from ldm.data.super_resolution import LowRes
from ldm.data.transforms import Draw
from ldm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path, 4)
    return ImageFolder(tmp_path, 8)


def test_channels_are_exchanged_and_stay_in_range(folder):
    plain = Recolored(folder, strength=0.0)
    orders = set()
    for epoch in range(20):
        image, drawn = folder[Draw(1, epoch)]["image"], plain[Draw(1, epoch)]["image"]
        orders.add(tuple(int((image - channel).abs().flatten(1).sum(1).argmin()) for channel in drawn))
        assert torch.equal(drawn.sort(0).values, image.sort(0).values)
    assert len(orders) > 3
    strong = torch.stack([Recolored(folder, strength=0.9)[Draw(2, epoch)]["image"] for epoch in range(20)])
    assert strong.abs().max() <= 1 and len(strong.flatten(1).unique(dim=0)) == 20


def test_what_is_drawn_follows_the_draw_and_further_keys_the_new_colours(folder):
    twins = LowRes(Recolored(folder), factor=2)
    first, again = twins[Draw(3, 1, 5)], twins[Draw(3, 1, 5)]
    assert torch.equal(first["image"], again["image"])
    assert np.allclose(first["image"].mean((1, 2)), first["low_res"].mean((1, 2)), atol=0.05)
    with pytest.raises(UserError, match="strength 1 must be in"):
        Recolored(folder, strength=1)
