import json
import logging

import numpy as np
import pytest
import torch
from picture_files import pixels, png
from PIL import Image

from ldm.data.core.transforms import SampleKey
from ldm.data.layout.boxes import Box, BoxTokenizer, LayoutObject
from ldm.data.layout.layouts import CocoLayouts, OpenImagesLayouts
from ldm.errors import UserError

HEIGHT, WIDTH = 40, 60
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}, {"id": 183, "name": "other"}]
COLOURS = {3: (255, 0, 0), 7: (0, 0, 255)}
BOXES = [(5, 4, 20, 10, 7), (30, 20, 16, 16, 3), (2, 30, 8, 6, 7)]  # left, top, width, height in pixels, category


def write_coco(root, count=3, boxes=BOXES, **document):
    """Write white images with coloured boxes, and the annotations that say so."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
        for left, top, width, height, category in boxes:
            canvas[top : top + height, left : left + width] = COLOURS[category]
            annotations.append({"image_id": i, "category_id": category, "bbox": [left, top, width, height]})
        Image.fromarray(canvas).save(root / "images" / f"{i:03}.png")
        images.append({"id": i, "file_name": f"{i:03}.png", "width": WIDTH, "height": HEIGHT})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **document}
    (root / "instances.json").write_text(json.dumps(content))
    return root / "images", root / "instances.json"


def objects(item):
    labels = item["box_labels"].tolist()
    return {(label, *map(float, box)) for label, box in zip(labels, item["boxes"], strict=True) if label >= 0}


def test_boxes_are_fractions_and_labels_ranks_of_ids(tmp_path):
    dataset = CocoLayouts(*write_coco(tmp_path), [HEIGHT, WIDTH], max_objects=5)
    item = dataset[0]
    assert dataset.class_names == ["ant", "cat"]
    assert item["boxes"].shape == (5, 4) and item["boxes"].dtype == torch.float32
    assert item["box_labels"].dtype == torch.int64 and (item["box_labels"][3:] == -1).all()
    assert not item["boxes"][3:].any()
    got = sorted(objects(item))
    want = sorted((int(c == 7), x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT) for x, y, w, h, c in BOXES)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("crop", ["center", "random", "random_size", "random_half", "none"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_boxes_lie_where_the_colours_are(tmp_path, crop, flip):
    paths = write_coco(tmp_path, 1)
    size = 32
    dataset = CocoLayouts(*paths, size, crop=crop, flip=flip, resize="none", interpolation="nearest")
    for epoch in range(6):
        item = dataset[SampleKey(0, epoch)]
        want = torch.zeros(2, size, size, dtype=torch.bool)
        centres = (torch.arange(size) + 0.5) / size
        for label, left, top, width, height in objects(item):
            rows = (centres >= top) & (centres < top + height)
            columns = (centres >= left) & (centres < left + width)
            want[label] |= rows[:, None] & columns[None, :]
        red, blue = item["image"][2] < 0, item["image"][0] < 0
        assert (want[0] == red).float().mean() > 0.93 and (want[1] == blue).float().mean() > 0.93


def test_objects_outside_the_crop_are_absent_and_others_are_cut(tmp_path):
    paths = write_coco(tmp_path, 1)
    item = CocoLayouts(*paths, 20, resize="none")[0]  # the middle: x 20..40, y 10..30
    got = sorted(objects(item))
    want = [(0, 0.5, 0.5, 0.5, 0.5), (1, 0.0, 0.0, 0.25, 0.2)]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_whole_layouts_are_tokenised_as_the_tokenizer_builds_them(tmp_path, flip):
    paths = write_coco(tmp_path, 1)
    dataset = CocoLayouts(*paths, 20, resize="none", flip=flip, whole=True)
    tokenizer = BoxTokenizer(num_classes=2, max_objects=30, vocab_size=8192)
    item = dataset[0]
    got = tokenizer.tokens(item["box_labels"].tolist(), item["boxes"].tolist(), item["crop"].tolist())
    scaled = [LayoutObject(int(c == 7), Box(x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT)) for x, y, w, h, c in BOXES]
    want = tokenizer.build(scaled, Box(20 / WIDTH, 10 / HEIGHT, 20 / WIDTH, 20 / HEIGHT), flip=flip > 0)

    def parts(tokens):
        return sorted(zip(tokens[:90:3], tokens[1:90:3], tokens[2:90:3], strict=True)), tokens[90:]

    assert parts(got) == parts(want)


def test_the_largest_objects_are_kept_in_a_drawn_order(tmp_path):
    dataset = CocoLayouts(*write_coco(tmp_path, 1), [HEIGHT, WIDTH], max_objects=2)
    orders = {tuple(dataset[SampleKey(0, epoch)]["box_labels"].tolist()) for epoch in range(20)}
    assert orders == {(0, 1), (1, 0)}
    areas = {round(float(box[2] * box[3]) * WIDTH * HEIGHT) for box in dataset[0]["boxes"]}
    assert areas == {200, 256}


def test_bad_boxes_are_cut_or_dropped_and_reported_once(tmp_path, caplog):
    bad = [
        {"image_id": 0, "category_id": 3, "bbox": [-10, -10, 30, 30]},
        {"image_id": 0, "category_id": 3, "bbox": [10, 10, 0, 5]},
        {"image_id": 0, "category_id": 3, "bbox": [100, 10, 5, 5]},
        {"image_id": 0, "category_id": 3, "bbox": [float("nan"), 10, 5, 5]},
        {"image_id": 0, "category_id": 183, "bbox": [1, 1, 5, 5]},
    ]
    paths = write_coco(tmp_path, 1, annotations=bad)
    with caplog.at_level(logging.WARNING):
        dataset = CocoLayouts(*paths, [HEIGHT, WIDTH])
        items = [dataset[0], dataset[0]]
    np.testing.assert_allclose(sorted(objects(items[0])), [(0, 0, 0, 20 / WIDTH, 20 / HEIGHT)], atol=1e-6)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "boxes are clipped to the image: 1, degenerate or too small: 3, of other classes: 1"
    )


def test_images_that_are_absent_or_empty_are_left_out_and_counted(tmp_path, caplog):
    annotations = [{"image_id": i, "category_id": 3, "bbox": [1, 1, 9, 9]} for i in (0, 1)]
    images, file = write_coco(tmp_path, 3, annotations=annotations)
    (images / "001.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert CocoLayouts(images, file, 8).names == ["000.png"]
    assert "1 images are not below" in caplog.text and "1 have fewer than 1 objects" in caplog.text
    (images / "000.png").unlink()
    (images / "002.png").unlink()
    (images / "x.png").write_bytes(png(pixels(0)))
    with pytest.raises(UserError, match="none of its 3 images is below .*, first 000.png"):
        CocoLayouts(images, file, 8)


def test_stuff_is_merged_and_crowds_are_marked(tmp_path):
    images, file = write_coco(tmp_path, 1)
    document = json.loads(file.read_text())
    crowd = [{"image_id": 0, "category_id": 92, "bbox": [0, 0, 60, 20], "iscrowd": 1}]
    stuff = document | {"annotations": crowd, "categories": [{"id": 92, "name": "sky"}, CATEGORIES[2]]}
    (tmp_path / "stuff.json").write_text(json.dumps(stuff))
    dataset = CocoLayouts(images, file, [HEIGHT, WIDTH], stuff=tmp_path / "stuff.json", use_group=True)
    assert dataset.class_names == ["ant", "cat", "sky"]
    assert sorted(label for label in dataset[0]["box_labels"].tolist() if label >= 0) == [0, 1, 1, 2 + 3]


def test_annotations_of_another_shape_are_skipped(tmp_path, caplog):
    images, file = write_coco(tmp_path, 2)
    Image.new("RGB", (HEIGHT, WIDTH), "red").save(images / "000.png")
    dataset = CocoLayouts(images, file, 8)
    assert torch.equal(dataset[0]["image"], dataset[1]["image"])
    assert "000.png cannot be read and is skipped: it is 60x40, its annotations say 40x60" in caplog.text


HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"


def write_open_images(root, rows, classes="/m/b,Bee\n/m/a,Ant\n"):
    (root / "images" / "part").mkdir(parents=True)
    for i, folder in enumerate(["", "part/"]):
        (root / "images" / f"{folder}000{i}.jpg").write_bytes(png(pixels(i, HEIGHT, WIDTH)))
    (root / "boxes.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (root / "classes.csv").write_text(classes)
    return root / "images", root / "boxes.csv", root / "classes.csv"


ROWS = [
    "0000,x,/m/a,1,0.1,0.5,0.2,0.6,0,0,0,0,0",
    "0001,x,/m/b,1,0,1,0.25,0.5,1,0,1,0,1",
    "0001,x,/m/z,1,0,1,0,1,0,0,0,0,0",
]


def test_open_images(tmp_path, caplog):
    paths = write_open_images(tmp_path, ROWS)
    dataset = OpenImagesLayouts(*paths, [HEIGHT, WIDTH], max_objects=3)
    assert dataset.names == ["0000.jpg", "part/0001.jpg"] and dataset.class_names == ["Ant", "Bee"]
    np.testing.assert_allclose(sorted(objects(dataset[0])), [(0, 0.1, 0.2, 0.4, 0.4)], atol=1e-6)
    np.testing.assert_allclose(sorted(objects(dataset[1])), [(1, 0, 0.25, 1, 0.25)], atol=1e-6)
    assert "of other classes: 1" in caplog.text
    flagged = OpenImagesLayouts(*paths, 8, use_group=True, use_attributes=True)
    tokenizer = BoxTokenizer(num_classes=2, max_objects=30, vocab_size=8192, use_attributes=True)
    item = tokenizer.decode_class(int(flagged[1]["box_labels"][0]))
    assert (item.category, item.is_group, item.is_occluded, item.is_depiction, item.is_inside) == (1, 1, 1, 0, 1)


def test_open_images_descriptions_may_have_a_header(tmp_path):
    paths = write_open_images(tmp_path, ROWS, "LabelName,DisplayName\n/m/a,Ant\n")
    assert OpenImagesLayouts(*paths, 8).class_names == ["Ant"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": None}, "has no 'annotations'"),
        ({"annotations": [{"image_id": 0, "category_id": 3}]}, r"annotations\[0\] has no 'bbox'"),
        ({"annotations": [{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "image_id 9, which is not among"),
        ({"annotations": [{"image_id": 0, "category_id": 3, "bbox": [0, 0]}]}, r"a box of 000.png is \[0, 0\], not"),
        *(
            ({"annotations": [{"image_id": 0, "category_id": 3, "bbox": box}]}, f"a box of 000.png is {shown}, not")
            for box, shown in ((5, "5"), (None, "None"), (["a", 1, 2, 3], r"\['a', 1, 2, 3\]"))
        ),
        ({"annotations": [3]}, r"instances.json: annotations\[0\] is 3, no object with image_id, category_id, bbox"),
        ({"annotations": 5}, "instances.json: annotations is no list"),
        ({"annotations": [{"image_id": [0], "category_id": 3, "bbox": []}]}, r"annotations\[0\]: .image_id. is \[0\]"),
        ({"categories": [{"id": {}, "name": "a"}]}, r"categories\[0\]: .id. is \{\}"),
        ({"images": [{"id": 0, "file_name": 3, "width": 1, "height": 1}]}, r"images\[0\]: .file_name. is 3"),
        ({"images": [{"id": 0, "file_name": "000.png", "width": "w", "height": 1}], "annotations": []}, "no numbers"),
        ({"images": [{"id": 0, "file_name": "000.png", "width": None, "height": 1}]}, "a box of 000.png is"),
        ({"annotations": []}, "no images"),
    ],
)
def test_mistakes_in_coco_are_named(tmp_path, change, message):
    images, file = write_coco(tmp_path, 1, **change)
    if change.get("annotations", 0) is None:
        document = json.loads(file.read_text())
        del document["annotations"]
        file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as caught:
        CocoLayouts(images, file, 8)
    assert "\n" not in str(caught.value)


def test_other_mistakes_are_named(tmp_path):
    images, file = write_coco(tmp_path, 1)
    with pytest.raises(UserError, match="absent.json: cannot be read as JSON"):
        CocoLayouts(images, tmp_path / "absent.json", 8)
    with pytest.raises(UserError, match="needs 1 <= min_objects=3 <= max_objects=2"):
        CocoLayouts(images, file, 8, max_objects=2, min_objects=3)
    paths = write_open_images(tmp_path / "open", ["0000,x,/m/a,1,left,1,0,1,0,0,0,0,0"])
    with pytest.raises(UserError, match="boxes.csv: line 2: could not convert"):
        OpenImagesLayouts(*paths, 8)
    paths = write_open_images(tmp_path / "cut", [*ROWS, "0000,x,/m/a,1"])
    with pytest.raises(UserError, match=f"boxes.csv: line {len(ROWS) + 2} has 4 fields"):
        OpenImagesLayouts(*paths, 8)
    paths[1].write_text("ImageID,LabelName\n")
    with pytest.raises(UserError, match="has no column 'XMin', it has ImageID, LabelName"):
        OpenImagesLayouts(*paths, 8)
