from functools import cache

import numpy as np
import pytest

from ldm.data.image_pairs.masks import MASKS, Boxes, RandomMask, Strokes
from ldm.errors import UserError


@cache
def drawn(name, height=64, width=64, count=60):
    return np.stack([MASKS[name](height, width, np.random.default_rng(i)) for i in range(count)])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (48, 96)])
def test_masks_have_a_hole_and_something_known(name, size):
    masks = drawn(name, *size, count=30)
    assert masks.shape == (30, *size) and masks.dtype == bool
    assert masks.any(axis=(1, 2)).all() and not masks.all(axis=(1, 2)).any()
    assert len(np.unique(masks.reshape(30, -1), axis=0)) > (15 if size != (8, 8) else 5)


def test_kinds_differ_in_their_area_and_none_covers_most_of_the_image():
    area = {name: drawn(name).mean() for name in MASKS}
    edges = {name: np.diff(drawn(name).astype(int), axis=2).__abs__().mean() for name in MASKS}
    assert area["medium"] < area["thick"] < area["lama"] and 0.15 < min(area.values())
    assert edges["thick"] < edges["medium"] < edges["thin"]
    assert drawn("thick").mean(axis=(1, 2)).max() <= 0.5
    assert drawn("mixed").mean(axis=(1, 2)).max() <= 0.5


@pytest.mark.parametrize("name", ["thick", "medium", "boxes"])
def test_areas_do_not_depend_on_the_resolution(name):
    coarse, fine = drawn(name, 32, 32, 100).mean(), drawn(name, 128, 128, 100).mean()
    assert coarse == pytest.approx(fine, rel=0.15)


def test_holes_reach_every_part_of_the_image():
    often = drawn("mixed", count=400).mean(axis=0)
    assert often.min() > 0.1


def test_a_stroke_is_as_wide_as_asked():
    across = Strokes((1, 1), (0.25, 0.25), (0.5, 0.5), turns=1)
    for seed in range(10):
        mask = across(64, 64, np.random.default_rng(seed))
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert columns[-1] - columns[0] + 1 <= 17 and mask.sum(axis=1).max() >= min(15, columns[-1] - columns[0] + 1)
        assert len(rows) >= 8


def test_impossible_masks_are_an_error():
    everything = Boxes((1, 1), (1.0, 1.0))
    with pytest.raises(UserError, match="none of 100 masks of 8x8 covers at most 50%; raise most"):
        RandomMask(everything)(8, 8, np.random.default_rng(0))
    with pytest.raises(UserError, match="needs boxes for box_share=0.5"):
        RandomMask(everything, box_share=0.5)
