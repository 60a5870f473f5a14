from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.toy.captions import COLOURS, OPPOSITE, RELATIONS, SHAPES, SIDES, SIZES, parse
from ldm.toy.scene_detector import caption_is_drawn, detect, score, verdict
from ldm.toy.shapes import Shapes

NUM = 200


@pytest.fixture(scope="module")
def scenes():
    data = Shapes(NUM, split="validation", seed=3)
    items = [data[i] for i in range(NUM)]
    return torch.stack([item["image"] for item in items]), [item["caption"] for item in items]


def blurred(images):
    k = torch.tensor([0.1, 0.8, 0.1])
    kernel = (k[:, None] * k)[None, None].repeat(3, 1, 1, 1)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def noisy(images):
    return images + 0.06 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spoil", [lambda x: x, blurred, noisy, lambda x: 0.9 * blurred(x) + 0.03])
def test_real_scenes_are_right_also_when_slightly_spoilt(scenes, spoil):
    images, captions = scenes
    assert score(spoil(images), captions)["right"] >= 0.99


@pytest.mark.parametrize("size", [24, 48, 96])
def test_any_resolution(size):
    data = Shapes(60, size=size)
    assert score([data[i]["image"] for i in range(60)], [data[i]["caption"] for i in range(60)])["right"] == 1


def test_scenes_of_three_things_are_read():
    data = Shapes(200, size=64, num_objects=(3, 3), size_words=1.0, split="validation")
    items = [data[i] for i in range(len(data))]
    captions = [item["caption"] for item in items]
    assert score([item["image"] for item in items], captions)["right"] >= 0.99
    scenes = [parse(text).things for text in captions]
    assert all(len(things) == 3 and all(thing.size for thing in things) for things in scenes)


def test_boxes_and_sizes_agree_with_the_data():
    data = Shapes(100, num_objects=(1, 1), size_words=1.0)
    for i in range(100):
        (found,), item = detect(data[i]["image"]), data[i]
        left, top, width, height = item["boxes"][0].tolist()
        np.testing.assert_allclose(found.box, (left, top, left + width, top + height), atol=1.5 / 32)
        assert found.size == parse(item["caption"]).things[0].size


def changed(description, part):
    """Yield the description with one thing wrong."""
    things = list(description.things)
    if part == "relation":
        yield replace(description, relation=OPPOSITE[description.relation])
    elif part == "side":
        yield replace(description, side=OPPOSITE[description.side])
    elif part == "swap":
        yield replace(description, things=(things[1], things[0], *things[2:]))
    elif part == "count":
        yield replace(description, things=tuple(things[:-1]), side=None, relation=None if len(things) < 3 else "left")
    else:
        words = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[part]
        for i, thing in enumerate(things):
            old = getattr(thing, part)
            others = [word for word in words if word != old and old is not None]
            for word in others:
                yield replace(description, things=(*things[:i], replace(thing, **{part: word}), *things[i + 1 :]))


@pytest.mark.parametrize("part", ["shape", "colour", "size", "relation", "swap", "side", "count"])
def test_one_wrong_thing_is_rejected(scenes, part):
    tried = 0
    for image, caption in list(zip(*scenes, strict=True))[:60]:
        description = parse(caption)
        needed = {"side": 3, "relation": 2, "swap": 2, "count": 2}.get(part, 1)
        if len(description.things) < needed:
            continue
        for wrong in changed(description, part):
            tried += 1
            assert not caption_is_drawn(image, wrong.caption())
    assert tried > 10


def test_every_other_relation_is_rejected(scenes):
    for image, caption in zip(*scenes, strict=True):
        description = parse(caption)
        if len(description.things) == 2:
            said = {relation: replace(description, relation=relation).caption() for relation in RELATIONS}
            assert [key for key in said if verdict(image, said[key]).relation] == [description.relation]


def test_shuffled_captions_score_low(scenes):
    images, captions = scenes
    result = score(images, captions[1:] + captions[:1])
    assert result["right"] < 0.06 and result["objects"] < 0.06


def test_breakdown():
    data = Shapes(100, num_objects=(2, 2), size_words=0.0)
    description = parse(data[0]["caption"])
    first, second = description.things
    crossed = replace(description, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))
    result = verdict(data[0]["image"], crossed.caption())
    expected = first.colour == second.colour or first.shape == second.shape
    assert result.count and result.shapes and result.colours and result.objects is expected


def test_pictures_of_nothing_are_wrong():
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for image in (torch.zeros(3, 32, 32), torch.ones(3, 32, 32), noise):
        assert not caption_is_drawn(image, "a red circle")


def test_speck_is_ignored_but_a_smear_is_not():
    item = Shapes(10, num_objects=(1, 1))[0]
    speck, smear = item["image"].clone(), item["image"].clone()
    background = item["segmentation"] == 0
    corner = (slice(None), slice(0, 2), slice(0, 2))
    strip = (slice(None), slice(0, 1) if background[0].all() else slice(31, 32), slice(None))
    speck[corner] = -1.0
    smear[strip] = torch.tensor([0.76, -0.76, -0.76])[:, None, None]
    assert caption_is_drawn(speck, item["caption"]) and not caption_is_drawn(smear, item["caption"])


def test_score_needs_pictures_of_three_channels():
    with pytest.raises(ValueError, match="no images"):
        score([], [])
    with pytest.raises(ValueError, match="expected"):
        detect(torch.zeros(1, 32, 32))


def test_sides_are_worded():
    assert set(SIDES) == set(RELATIONS)
