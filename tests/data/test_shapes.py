import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ldm.errors import UserError
from ldm.toy.captions import SIZES, parse, two_object_descriptions
from ldm.toy.shapes import HALF_EXTENTS, MAX_OBJECTS, PALETTE, Shapes, covered, held_out, held_out_captions


def test_items_have_the_documented_shapes_and_ranges():
    batch = default_collate([Shapes(100, size=24)[i] for i in range(16)])
    assert batch["image"].shape == (16, 3, 24, 24) and batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() and batch["image"].max() <= 1
    assert isinstance(batch["caption"], list) and batch["class_label"].dtype == torch.int64
    assert batch["boxes"].shape == (16, MAX_OBJECTS, 4) and batch["box_labels"].shape == (16, MAX_OBJECTS)
    assert batch["segmentation"].shape == (16, 24, 24)
    assert batch["segmentation"].unique().tolist() == [0, 1, 2, 3]


def test_fields_choose_what_goes_beside_the_image():
    every, few, none = Shapes(5)[3], Shapes(5, fields=["caption"])[3], Shapes(5, fields=[])[3]
    assert set(few) == {"image", "caption"} and set(none) == {"image"}
    assert torch.equal(few["image"], every["image"]) and few["caption"] == every["caption"]


def test_a_scene_depends_on_seed_split_and_index_only():
    first, again, other = Shapes(50, seed=1), Shapes(1000, seed=1), Shapes(50, seed=2)
    assert torch.equal(first[7]["image"], again[7]["image"]) and first[7]["caption"] == again[7]["caption"]
    assert not torch.equal(first[7]["image"], other[7]["image"])
    assert not torch.equal(first[7]["image"], first[8]["image"])
    assert not torch.equal(first[7]["image"], Shapes(50, seed=1, split="validation")[7]["image"])


def test_same_scene_at_any_resolution():
    small, large = Shapes(20, size=32), Shapes(20, size=128)
    for i in range(20):
        reduced = large[i]["image"].unflatten(2, (32, 4)).unflatten(1, (32, 4)).mean((2, 4))
        assert small[i]["caption"] == large[i]["caption"]
        assert (small[i]["image"] - reduced).abs().mean() < 0.01


@pytest.mark.parametrize("shape", HALF_EXTENTS)
def test_every_shape_covers_the_area_of_a_disc(shape):
    grid = (np.arange(200) + 0.5) / 200
    radius = 0.2
    share = covered(shape, np.array([0.5, 0.5]), radius * np.array(HALF_EXTENTS[shape]), grid, grid)
    assert share.mean() == pytest.approx(np.pi * radius**2, rel=0.01)


def test_boxes_enclose_the_shapes_and_nothing_overlaps():
    data = Shapes(200, size=64)
    for i in range(200):
        item = data[i]
        inside = torch.zeros(64, 64, dtype=torch.bool)
        for label, (left, top, width, height) in zip(item["box_labels"], item["boxes"] * 64, strict=True):
            if label < 0:
                continue
            x0, y0, x1, y1 = int(left), int(top), int(left + width) + 1, int(top + height) + 1
            assert 0 < x0 < x1 < 64 and 0 < y0 < y1 < 64
            assert not inside[y0:y1, x0:x1].any()
            inside[y0:y1, x0:x1] = True
            assert (item["segmentation"][y0:y1, x0:x1] == 1 + label // len(PALETTE)).float().mean() > 0.35
        assert not item["segmentation"][~inside].any()


def test_captions_read_back_and_relations_are_clear_cut():
    data = Shapes(500)
    for i in range(500):
        scene, _ = data.scene(i)
        caption = scene.description.caption()
        assert parse(caption) == scene.description and caption == data[i]["caption"]
        if scene.description.relation is None:
            continue
        dx, dy = scene.centres[1] - scene.centres[0]
        along = {"left": dx, "right": -dx, "above": dy, "below": -dy}[scene.description.relation]
        across = dy if scene.description.relation in ("left", "right") else dx
        assert along > 0.2 and along > 2 * abs(across)


def test_grammar():
    description = parse("A small red circle to the left of a blue square, and a green triangle below.")
    assert [thing.size for thing in description.things] == ["small", None, None]
    assert (description.relation, description.side) == ("left", "below")
    assert description.caption() == "a small red circle to the left of a blue square, and a green triangle below"
    with pytest.raises(UserError, match="not understood"):
        parse("a red dog")


def test_every_third_thing_and_size_word_occurs():
    captions = [Shapes(2000)[i]["caption"] for i in range(2000)]
    counts = [len(parse(caption).things) for caption in captions]
    assert all(counts.count(count) > 500 for count in (1, 2, 3))
    assert all(any(word in caption for caption in captions) for word in SIZES)
    assert not any(word in Shapes(200, size_words=0)[i]["caption"] for word in SIZES for i in range(200))


def test_training_never_shows_a_held_out_pair():
    assert not any(held_out(Shapes(2000)[i]["caption"]) for i in range(2000))
    validation = Shapes(500, split="validation")
    captions = [validation[i]["caption"] for i in range(500)]
    assert all(held_out(caption) == (len(parse(caption).things) > 1) for caption in captions)


def test_held_out_captions_are_distinct_stable_and_symmetric():
    captions = held_out_captions(200)
    assert len(set(captions)) == 200 and captions == held_out_captions(200) != held_out_captions(200, seed=1)
    assert all(held_out(caption) and len(parse(caption).things) == 2 for caption in captions)
    assert held_out("a red circle to the left of a blue square") == held_out(
        "a large blue square to the right of a red circle"
    )
    total = sum(1 for _ in two_object_descriptions())
    assert 0.15 < len(held_out_captions(total // 5)) / total < 0.35
    with pytest.raises(UserError, match="num_captions"):
        held_out_captions(total)


def test_class_labels_are_balanced():
    labels = np.array([Shapes(3000, num_objects=(1, 1))[i]["class_label"] for i in range(3000)])
    counts = np.bincount(labels, minlength=18)
    assert len(counts) == 18 and counts.min() > 100


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "test"},
        {"num_objects": (0, 2)},
        {"num_objects": (1, 4)},
        {"size": 4},
        {"size_words": 2.0},
        {"fields": ["box"]},
    ],
)
def test_wrong_settings_are_user_errors(wrong):
    with pytest.raises(UserError, match="Shapes"):
        Shapes(10, **wrong)


def test_index_out_of_range():
    with pytest.raises(IndexError):
        Shapes(10)[10]
