import pytest
import torch

from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.text import TokenConditioner
from ldm.data.layout.boxes import Box, BoxTokenizer, CentrePointTokenizer, LayoutObject
from ldm.errors import UserError

OBJECTS = [(3, (0.1, 0.2, 0.3, 0.4)), (7, (0.5, 0.5, 0.5, 0.5))]


def tokenizer(cls=BoxTokenizer, **options):
    return cls(**{"num_classes": 10, "max_objects": 4, "vocab_size": 256, **options})


def batch(objects=OBJECTS, places=4, samples=2):
    boxes, labels = torch.zeros(samples, places, 4), torch.full((samples, places), -1)
    for i, (label, box) in enumerate(objects):
        boxes[:, i], labels[:, i] = torch.tensor(box), label
    return {"boxes": boxes, "box_labels": labels}


@pytest.mark.parametrize("cls", [BoxTokenizer, CentrePointTokenizer])
@pytest.mark.parametrize("encode_crop", [False, True])
def test_tokens_are_those_that_the_tokenizer_builds(cls, encode_crop):
    conditioner = LayoutConditioner(tokenizer(cls, encode_crop=encode_crop), 16, 1)
    want = conditioner.tokenizer.build([LayoutObject(label, Box(*box)) for label, box in OBJECTS])
    ids = conditioner.ids(conditioner.value(batch()))
    assert ids.tolist() == [want, want]
    assert conditioner(batch()).context.shape == (2, conditioner.tokenizer.length, 16)


def test_absent_objects_leave_no_gap():
    first, second = batch(), batch()
    for key in second:
        second[key] = second[key][:, [0, 2, 1, 3]]
    conditioner = LayoutConditioner(tokenizer(), 16, 1)
    assert torch.equal(*(conditioner.ids(conditioner.value(layout)) for layout in (first, second)))


def test_crops_of_the_batch_are_encoded():
    conditioner = LayoutConditioner(tokenizer(), 16, 1)
    crop = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.4, 0.4, 0.4]])
    full, cropped = conditioner.ids(conditioner.value({**batch(), "crop": crop}))
    assert torch.equal(full, conditioner.ids(conditioner.value(batch()))[0])
    assert cropped[-2:].tolist() == list(conditioner.tokenizer.encode_corners(Box(*crop[1].tolist())))


def test_null_is_the_layout_of_absent_objects():
    conditioner = LayoutConditioner(tokenizer(), 16, 1).eval()
    ids = torch.full((1, conditioner.tokenizer.length), 255)
    torch.testing.assert_close(conditioner.unconditional(1).context, conditioner.transformer(ids))


def test_published_weights_fit_and_give_the_same():
    """The published model reads ids; its names and its null are these."""
    published = TokenConditioner(8192, 92, 16, 2, null_tokens=[8191] * 92).eval()
    ours = LayoutConditioner(BoxTokenizer(600, 30, 8192), 16, 2).eval()
    ours.load_state_dict(published.state_dict(), strict=True)
    ids = ours.ids(ours.value(batch(places=30)))
    torch.testing.assert_close(ours(batch(places=30)).context, published({"tokens": ids}).context)
    torch.testing.assert_close(ours.unconditional(2).context, published.unconditional(2).context)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([(20, (0, 0, 1, 1))], "labels up to 20, but max_objects=4 and num_classes=10; set both"),
        ([(0, (0, 0, 1, 1))] * 5, "5 objects with labels up to 0, but max_objects=4"),
        ([(0, (0.5, 0.5, 9, 9))], "a token is outside 0..255; boxes must lie"),
    ],
)
def test_layouts_that_do_not_fit_are_named(objects, message):
    with pytest.raises(UserError, match=message):
        LayoutConditioner(tokenizer(), 16, 1)(batch(objects, places=5))


def test_flags_extend_the_classes():
    conditioner = LayoutConditioner(tokenizer(use_group=True), 16, 1)
    assert conditioner.ids(conditioner.value(batch([(13, (0, 0, 1, 1))])))[0, 0] == 13
    with pytest.raises(UserError, match="labels up to 13"):
        LayoutConditioner(tokenizer(use_group=False), 16, 1)(batch([(13, (0, 0, 1, 1))]))


def test_labels_are_needed():
    with pytest.raises(UserError, match="'box_labels'.* boxes"):
        LayoutConditioner(tokenizer(), 16, 1)({"boxes": torch.zeros(1, 4, 4)})


def test_crops_that_would_be_lost_are_refused():
    conditioner = LayoutConditioner(tokenizer(encode_crop=False), 16, 1)
    with pytest.raises(UserError, match="'crop'.* encode_crop"):
        conditioner({**batch(), "crop": torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)})
