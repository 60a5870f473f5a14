import hashlib

import pytest
from picture_files import pixels, png

from ldm.data.readers.imagenet import ImageNet
from ldm.data.readers.imagenet_synsets import SYNSETS
from ldm.errors import UserError

AGARIC, RETRIEVER, TENCH = "n12998815", "n02099601", "n01440764"


def write_tree(root, synsets=(AGARIC, RETRIEVER, TENCH), count=2):
    for synset in synsets:
        (root / synset).mkdir(parents=True)
        for i in range(count):
            (root / synset / f"{synset}_{i}.JPEG").write_bytes(png(pixels(i)))
    return root


def write_flat(root):
    root.mkdir()
    for i in range(1, 4):
        (root / f"ILSVRC2012_val_{i:08}.JPEG").write_bytes(png(pixels(i)))
    return root


def labels(dataset):
    return [(item["class_label"], item["synset"]) for item in dataset]


def test_the_list_is_the_official_one():
    assert len(SYNSETS) == 1000 and list(SYNSETS) == sorted(set(SYNSETS))
    digest = hashlib.sha256("\n".join(SYNSETS).encode()).hexdigest()
    assert digest.startswith("385e0240499426c0")  # of imagenet_synsets.txt as several model libraries ship it


@pytest.mark.parametrize("order", ["ilsvrc", "released"])
def test_labels_count_in_all_thousand_whatever_is_present(tmp_path, order):
    dataset = ImageNet(write_tree(tmp_path / "train"), 8, label_order=order)
    assert labels(dataset)[::2] == [(0, TENCH), (207, RETRIEVER), (992, AGARIC)]
    assert dataset.class_names == dataset.synsets == SYNSETS and len(dataset) == 6


def test_present_numbers_what_is_there(tmp_path):
    dataset = ImageNet(write_tree(tmp_path / "train", [TENCH, "n99999999"]), 8, label_order="present")
    assert labels(dataset)[::2] == [(0, TENCH), (1, "n99999999")]
    with pytest.raises(UserError, match="n99999999 and 0 more are not among the 1000 .* set label_order=present"):
        ImageNet(tmp_path / "train", 8)


@pytest.mark.parametrize(
    "text",
    [
        f"{AGARIC}\n{TENCH}\n{RETRIEVER}\n",
        f"ILSVRC2012_val_00000003.JPEG {RETRIEVER}\nILSVRC2012_val_00000001.JPEG {AGARIC}\n"
        f"ILSVRC2012_val_00000002.JPEG {TENCH}\n",
        f"ImageId,PredictionString\nILSVRC2012_val_00000002,{TENCH} 85 1 499 272\n"
        f"ILSVRC2012_val_00000001,{AGARIC} 1 2 3 4\nILSVRC2012_val_00000003,{RETRIEVER} 1 2 3 4 {RETRIEVER} 5 6 7 8\n",
    ],
    ids=["synsets", "validation_synset.txt", "kaggle"],
)
def test_flat_validation_set(tmp_path, text):
    (tmp_path / "labels.txt").write_text(text)
    dataset = ImageNet(write_flat(tmp_path / "val"), 8, labels=tmp_path / "labels.txt")
    assert [synset for _, synset in labels(dataset)] == [AGARIC, TENCH, RETRIEVER]


def test_splits_keep_labels_with_their_images(tmp_path):
    write_tree(tmp_path / "train", count=20)
    parts = [ImageNet(tmp_path / "train", 8, split=split, validation_share=0.3) for split in ("train", "validation")]
    assert sum(map(len, parts)) == 60
    for part in parts:
        assert all(name.startswith(item["synset"]) for name, item in zip(part.names, part, strict=True))


def test_mistakes_are_named(tmp_path):
    flat = write_flat(tmp_path / "val")
    table = tmp_path / "labels.txt"
    for text, message in [
        ("1\n2\n3\n", "holds numbers, which releases count differently"),
        (f"{TENCH}\n", "has no synset for 2 of 3 images, first ILSVRC2012_val_00000002.JPEG"),
        ("", "has no synset for 3 of 3"),
    ]:
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            ImageNet(flat, 8, labels=table)
    with pytest.raises(UserError, match="cannot be read .* set labels to"):
        ImageNet(flat, 8, labels=tmp_path / "absent")
    with pytest.raises(UserError, match="is in no folder named by a synset such as n01440764; for the flat"):
        ImageNet(flat, 8)
    with pytest.raises(UserError, match="label_order 'sorted' is not one of ilsvrc, released, present"):
        ImageNet(flat, 8, label_order="sorted")
