import json
import logging

import pytest
from picture_files import write_pictures

from ldm.data.core.transforms import SampleKey
from ldm.data.readers.captions import CaptionedFolder
from ldm.errors import UserError


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path)
    return tmp_path


def write_csv(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_beside_each_image(root):
    for name in ("a", "c", "sub/b", "sub/d"):
        (root / f"{name}.txt").write_text(f" text of {name}\n")
    dataset = CaptionedFolder(root, 8)
    assert [item["caption"] for item in dataset] == ["text of a", "text of c", "text of sub/b", "text of sub/d"]
    assert list(dataset.texts()) == [item["caption"] for item in dataset]
    (root / "c.txt").unlink()
    dataset = CaptionedFolder(root, 8)
    assert [item["caption"] for item in dataset][1] == "text of sub/b" and dataset.errors.num_unreadable == 1
    for name in ("a.txt", "sub/b.txt", "sub/d.txt"):
        (root / name).unlink()
    with pytest.raises(UserError, match="none of the 4 images has a caption, first a.png; write a.txt, or set capt"):
        CaptionedFolder(root, 8)


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_table_with_named_columns_and_class_names(root, suffix, comma):
    rows = [("image", "text", "kind"), ("sub/b.png", '"blue, or so"', "zebra"), ("a.png", "red", "ant")]
    write_csv(root / f"table.{suffix}", "\n".join(comma.join(row) for row in rows))
    columns = {"file": "image", "caption": "text", "class_label": "kind"}
    dataset = CaptionedFolder(root, 8, captions=f"table.{suffix}", columns=columns)
    assert dataset.names == ["sub/b.png", "a.png"] and dataset.class_names == ["ant", "zebra"]
    assert (dataset[0]["caption"], dataset[0]["class_label"]) == ("blue, or so", 1)
    assert list(dataset.texts()) == ["blue, or so", "red"]


def test_a_word_among_numbers_is_told_since_it_makes_all_of_them_names(root, caplog):
    path = write_csv(root / "t.csv", "file,caption,class_label\na.png,red,10\nc.png,blue,other\n")
    assert CaptionedFolder(root, 8, path, {"class_label": "class_label"}).class_names == ["10", "other"]
    assert "labels: other is no whole number" in caplog.text


def test_whole_number_labels_stay(root):
    path = write_csv(root / "t.csv", "file,caption,class_label\na.png,red,7\nc.png,blue,3\n")
    dataset = CaptionedFolder(root, 8, path, {"class_label": "class_label"})
    assert [item["class_label"] for item in dataset] == [7, 3] and dataset.class_names == []


def test_json_lines_draw_one_of_several_captions_per_epoch(root):
    rows = [{"file": "a.png", "caption": ["one", "two", "three"]}, {"file": "c.png", "caption": "four"}]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = CaptionedFolder(root, 8, "t.jsonl")
    drawn = {dataset[SampleKey(0, epoch)]["caption"] for epoch in range(30)}
    assert drawn == {"one", "two", "three"} and dataset[1]["caption"] == "four"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "t.jsonl",
            '{"file": "a.png", "caption": "x"}\n{"file": "c.png", "caption": null}\n{"file": "sub/b.png"}\n',
            2,
        ),
        ("t.csv", "file,caption\na.png,x\nc.png\nsub/b.png\n", 3),
    ],
)
def test_rows_without_a_caption_are_left_out_and_the_first_named(root, caplog, name, content, line):
    with caplog.at_level(logging.WARNING):
        assert CaptionedFolder(root, 8, write_csv(root / name, content)).names == ["a.png"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{root / name}: 2 of 3 rows have nothing under one of file, caption and are left out, the first is line {line}"
    )


def test_labels_do_not_depend_on_the_split(root):
    lines = "\n".join(f"{name},text,{name}" for name in ("a.png", "c.png", "sub/b.png", "sub/d.png"))
    path = write_csv(root / "t.csv", f"file,caption,kind\n{lines}\n")
    parts = [
        CaptionedFolder(root, 8, path, {"class_label": "kind"}, split=split, validation_share=0.5)
        for split in ("all", "train", "validation")
    ]
    labels = [dict(zip(part.names, [item["class_label"] for item in part], strict=True)) for part in parts]
    assert labels[0] == {**labels[1], **labels[2]} and len(labels[0]) == 4


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.csv", "image,caption\na.png,x\n", {}, "no column 'file' for 'file', it has image, caption; set"),
        ("t.csv", "file,text\na.png,x\n", {}, "columns.caption=NAME"),
        ("t.csv", "file,caption\nz.png,x\n", {}, "z.png is not below .* set root"),
        ("t.csv", "file,caption\n", {}, "no images"),
        ("t.jsonl", "{}\nnonsense\n", {}, "line 2 is not JSON"),
        ("t.jsonl", "[1]\n", {}, "line 1 is no object"),
        ("t.xls", "", {}, "must be a .csv, .tsv or .jsonl file"),
        ("t.csv", "", {"captions": "absent.csv"}, "absent.csv: no such file"),
        ("t.csv", "", {"captions": None, "columns": {"file": "x"}}, "columns are those of a table"),
    ],
)
def test_mistakes_are_named_in_one_line(root, name, content, options, message):
    write_csv(root / name, content)
    with pytest.raises(UserError, match=message) as caught:
        CaptionedFolder(root, 8, **{"captions": name, **options})
    assert "\n" not in str(caught.value)
