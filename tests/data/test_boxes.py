import random

import pytest

from ldm.data.layout.boxes import FULL_IMAGE, Box, BoxTokenizer, CentrePointTokenizer, LayoutObject, visible_objects
from ldm.errors import UserError

CAR = LayoutObject(3, Box(0.1, 0.2, 0.3, 0.4))
CROWD = LayoutObject(7, Box(0.5, 0.5, 0.5, 0.5), is_group=True, is_depiction=True)
EVERYTHING = LayoutObject(0, FULL_IMAGE, is_occluded=True, is_inside=True)
OBJECTS = [CAR, CROWD, EVERYTHING]


def tokenizer(cls=BoxTokenizer, **options):
    return cls(**{"num_classes": 20, "max_objects": 5, "vocab_size": 1024, "use_attributes": True, **options})


def test_published_layout_model_has_92_tokens_of_90_sections():
    published = tokenizer(max_objects=30, vocab_size=8192)
    assert (published.length, published.num_sections, published.none_token) == (92, 90, 8191)
    assert tokenizer(CentrePointTokenizer, encode_crop=False).length == 10


def test_corners_of_the_image_are_the_first_and_the_last_node():
    assert tokenizer().encode_corners(FULL_IMAGE) == (0, 32 * 32 - 1)


@pytest.mark.parametrize("token", [0, 31, 500, 1023])
def test_points_round_trip(token):
    assert tokenizer().encode_point(*tokenizer().decode_point(token)) == token


@pytest.mark.parametrize("item", OBJECTS)
def test_classes_round_trip_with_their_flags(item):
    assert tokenizer().decode_class(tokenizer().encode_class(item), item.box) == item
    plain = tokenizer(use_group=False, use_attributes=False)
    assert plain.encode_class(item) == item.category
    assert plain.decode_class(item.category) == LayoutObject(item.category, FULL_IMAGE)


@pytest.mark.parametrize("cls", [BoxTokenizer, CentrePointTokenizer])
@pytest.mark.parametrize("crop", [None, Box(0.05, 0.1, 0.9, 0.8)])
def test_layouts_round_trip_within_half_a_section(cls, crop):
    tokens = tokenizer(cls).build(OBJECTS, crop)
    layout = tokenizer(cls).inverse_build(tokens)
    assert [token % 20 for token, _ in layout.objects] == [3, 7, 0]
    assert layout.crop == pytest.approx(crop or FULL_IMAGE, abs=1 / 31)
    for (_, place), item in zip(layout.objects, OBJECTS, strict=True):
        left, top, width, height = item.box
        want = item.box if cls is BoxTokenizer else (left + width / 2, top + height / 2)
        assert place == pytest.approx(want, abs=1 / 31)


def test_absent_objects_are_filled_and_surplus_ones_left_out():
    tokens = tokenizer(encode_crop=False).build([CAR])
    assert tokens[3:] == [1023] * 12
    few = tokenizer(max_objects=2, encode_crop=False)
    assert [token % 20 for token, _ in few.inverse_build(few.build(OBJECTS)).objects] == [3, 7]


def test_order_is_drawn_from_the_generator_and_the_callers_list_is_left_alone():
    def order(seed):
        return tuple(tokenizer().build(OBJECTS, rng=random.Random(seed))[:9:3])

    assert order(1) == order(1) and len({order(seed) for seed in range(50)}) == 6
    random.seed(1)
    assert tuple(tokenizer().build(OBJECTS, rng=random)[:9:3]) == order(1)
    assert OBJECTS == [CAR, CROWD, EVERYTHING]


def test_objects_outside_the_crop_are_dropped():
    crop = Box(0.0, 0.0, 0.5, 0.5)
    assert visible_objects(OBJECTS, crop) == [CAR, EVERYTHING]
    assert len(tokenizer().inverse_build(tokenizer().build(OBJECTS, crop)).objects) == 2


def test_boxes_are_relative_to_the_crop_unless_it_is_encoded():
    crop = Box(0.0, 0.2, 0.5, 0.5)
    (_, place), *_ = tokenizer(encode_crop=False).inverse_build(tokenizer(encode_crop=False).build([CAR], crop)).objects
    assert place == pytest.approx((0.2, 0.0, 0.6, 0.8), abs=1 / 31)
    (_, place), *_ = tokenizer().inverse_build(tokenizer().build([CAR], crop)).objects
    assert place == pytest.approx(CAR.box, abs=1 / 31)


@pytest.mark.parametrize("encode_crop", [False, True])
def test_flip_mirrors_boxes_and_crop(encode_crop):
    crop = Box(0.05, 0.0, 0.7, 0.7)
    layout = tokenizer(encode_crop=encode_crop).inverse_build(
        tokenizer(encode_crop=encode_crop).build([CAR], crop, flip=True)
    )
    box = CAR.box if encode_crop else CAR.box.relative_to(crop)
    assert layout.objects[0][1] == pytest.approx(box.flipped(), abs=1 / 31)
    assert layout.crop is None if not encode_crop else layout.crop == pytest.approx(crop.flipped(), abs=1 / 31)


def test_mirror_is_an_involution():
    assert CAR.box.flipped().flipped() == pytest.approx(CAR.box)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="num_classes=20 < vocab_size=10"):
        tokenizer(vocab_size=10)
    with pytest.raises(UserError, match="a token is outside 0..1023; boxes must lie"):
        tokenizer().build([LayoutObject(2000, FULL_IMAGE)])
    with pytest.raises(ValueError, match="17 tokens, not 3"):
        tokenizer().inverse_build([1, 2, 3])


@pytest.mark.parametrize("cls", [BoxTokenizer, CentrePointTokenizer])
@pytest.mark.parametrize("crop", [None, (0.05, 0.1, 0.9, 0.8)])
def test_batches_are_encoded_as_layouts_are_built(cls, crop):
    labels = [tokenizer(cls).encode_class(item) for item in OBJECTS]
    boxes = [list(item.box) for item in OBJECTS]
    got = tokenizer(cls).tokens([labels[0], -1, *labels[1:], -1], [boxes[0], [0] * 4, *boxes[1:], [0] * 4], crop)
    assert got == tokenizer(cls).build(OBJECTS, crop and Box(*crop))
