import json
import logging

import pytest
import torch
from picture_files import pixels, png

from ldm.data.core.transforms import SampleKey
from ldm.data.readers.parquet import Parquet
from ldm.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, count=6, group=2, metadata=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"image": [{"bytes": png(pixels(i)), "path": f"{i}.png"} for i in range(count)]}
    content["caption"] = [f"picture {i}" for i in range(count)]
    table = pa.table(content | columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_images_and_captions_in_any_order(tmp_path):
    dataset = Parquet(write(tmp_path / "a.parquet"), [12, 16])
    for i in (5, 0, 3):
        assert dataset[i]["caption"] == f"picture {i}"
        want = torch.from_numpy(pixels(i)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(dataset[i]["image"], want)
    assert list(dataset.texts()) == [f"picture {i}" for i in range(6)]
    assert dataset.names[4] == "a.parquet: row 4"


@pytest.mark.parametrize("given", ["folder", "glob", "list"])
def test_several_tables(tmp_path, given):
    paths = [write(tmp_path / "data" / f"train-{i}.parquet", 3) for i in range(2)]
    write(tmp_path / "other.parquet", 1)
    chosen = {"folder": tmp_path / "data", "glob": tmp_path / "data" / "train-*.parquet", "list": paths}[given]
    dataset = Parquet(chosen, 8)
    assert [item["caption"] for item in dataset] == [f"picture {i}" for i in range(3)] * 2


def test_plain_bytes_and_other_columns(tmp_path):
    columns = {"jpg": [png(pixels(i)) for i in range(3)], "kind": ["b", "a", "b"]}
    write(tmp_path / "a.parquet", 3, **columns)
    dataset = Parquet(tmp_path / "a.parquet", 8, columns={"image": "jpg", "class_label": "kind"})
    assert [item["class_label"] for item in dataset] == [1, 0, 1] and dataset.class_names == ["a", "b"]
    assert dataset[0].keys() == {"image", "class_label"}


def test_names_of_classes_from_the_hub(tmp_path):
    metadata = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    path = write(tmp_path / "a.parquet", 2, label=[1, 0], metadata=metadata)
    dataset = Parquet(path, 8, columns={"class_label": "label"})
    assert dataset.class_names == ["cat", "dog"] and dataset[0]["class_label"] == 1


def test_images_beside_the_table(tmp_path):
    (tmp_path / "a.png").write_bytes(png(pixels(1)))
    write(tmp_path / "a.parquet", 1, image=[{"bytes": None, "path": "a.png"}])
    assert Parquet(tmp_path / "a.parquet", 8)[0]["image"].shape == (3, 8, 8)


def test_one_of_several_captions_is_drawn_per_epoch(tmp_path):
    path = write(tmp_path / "a.parquet", 2, caption=[["one", "two", "three"], []])
    dataset = Parquet(path, 8)
    assert {dataset[SampleKey(0, epoch)]["caption"] for epoch in range(20)} == {"one", "two", "three"}
    assert dataset[1]["caption"] == "" and dataset.errors.num_empty == 1


def test_incomplete_rows_and_broken_images_are_named(tmp_path, caplog):
    images = [{"bytes": png(pixels(i)), "path": None} for i in range(4)]
    images[1]["bytes"], images[2] = b"broken", None
    path = write(tmp_path / "a.parquet", 4, image=images, caption=["a", "b", "c", None])
    with caplog.at_level(logging.WARNING):
        dataset = Parquet(path, 8)
        assert [item["caption"] for item in dataset] == ["a", "a", "a"]
    assert dataset.errors.num_unreadable == 2
    assert "a.parquet: 1 of 4 rows have nothing under one of caption" in caplog.text and "row 3" in caplog.text
    assert "a.parquet: row 1 cannot be read" in caplog.text and "a.parquet: row 2 cannot be read" in caplog.text


def test_row_groups_are_kept_up_to_a_size(tmp_path, caplog):
    dataset = Parquet(write(tmp_path / "a.parquet"), 8, cache_mb=0)
    with caplog.at_level(logging.WARNING):
        assert [item["caption"] for item in dataset] == [f"picture {i}" for i in range(6)]
    assert len(dataset._groups) == 1
    assert caplog.text.count("write the table anew with a small row_group_size") == 1


def test_mistakes_are_named(tmp_path):
    path = write(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for paths, columns, message in [
        (path, {"caption": "text"}, "no column 'text' for 'caption', it has image, caption; set columns.caption=NAME"),
        (tmp_path / "b.parquet", None, "not a readable Parquet table"),
        (tmp_path / "absent.parquet", None, "no such table; set paths"),
        (tmp_path / "empty", None, r"a folder without \*.parquet files"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            Parquet(paths, 8, columns=columns)
        assert "\n" not in str(caught.value)
