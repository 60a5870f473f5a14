"""Data sets of the Hugging Face hub and its library: tables of `save_to_disk`, shards and splits, imagefolder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_files import pixels, png, write_pictures, write_tar

from ldm.data.core.files import check_one_split
from ldm.data.core.transforms import SampleKey
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.folders import ImageFolder
from ldm.data.readers.parquet import Parquet
from ldm.data.shards.shards import IndexedShards
from ldm.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def content(rows: range, **columns: list[Any]) -> Any:
    """Return a table as the library makes it, with the names of classes in its metadata."""
    images = [{"bytes": png(pixels(i)), "path": f"{i}.png"} for i in rows]
    table = pa.table(
        {"image": images, "caption": [f"image {i}" for i in rows], "label": [i % 2 for i in rows]} | columns
    )
    noted = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(noted)})


def saved(folder: Path, parts: list[range], random_access: bool = False) -> Path:
    """Write what `Dataset.save_to_disk` writes: Arrow files of small batches, and the state that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = content(rows)
        opened = pa.ipc.new_file if random_access else pa.ipc.new_stream
        with opened(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def items(dataset: Any) -> list[tuple[str, int, bytes]]:
    return [(item["caption"], item["class_label"], item["image"].numpy().tobytes()) for item in dataset]


COLUMNS = {"caption": "caption", "class_label": "label"}


@pytest.mark.parametrize("random_access", [False, True])
def test_save_to_disk_is_read_as_parquet_is(tmp_path: Path, random_access: bool) -> None:
    folder = saved(tmp_path / "saved", [range(3), range(3, 7)], random_access)
    pq.write_table(content(range(7)), tmp_path / "all.parquet", row_group_size=2)
    arrow, parquet = (Parquet(path, 8, COLUMNS) for path in (folder, tmp_path / "all.parquet"))
    assert items(arrow) == items(parquet) and len(arrow) == 7
    assert arrow.class_names == parquet.class_names == ["cat", "dog"]
    want = torch.from_numpy(pixels(5)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(Parquet(folder, [12, 16])[5]["image"], want)


def test_the_state_says_which_files_and_in_which_order(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", [range(2), range(2, 4)])
    shutil.copy(folder / "data-00000-of-00002.arrow", folder / "cache-0123.arrow")  # of a later `map` of the library
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert [item["caption"] for item in Parquet(folder, 8)] == [f"image {i}" for i in (2, 3, 0, 1)]


def test_a_dict_of_one_split_is_that_split(tmp_path: Path) -> None:
    saved(tmp_path / "dict" / "train", [range(3)])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(Parquet(tmp_path / "dict", 8)) == 3


def test_mapped_files_take_nothing_of_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = Parquet(saved(tmp_path / "saved", [range(3), range(3, 6)]), 8, cache_mb=0)
    with caplog.at_level(logging.WARNING):
        assert len(list(dataset)) == 6
    assert not caplog.records and len(dataset._groups) == 2


def test_mistakes_of_saved_folders_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "dict" / split, [range(2)])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    lost = saved(tmp_path / "lost", [range(2), range(2)])
    (lost / "data-00001-of-00002.arrow").unlink()
    other = saved(tmp_path / "other", [range(2)])
    (other / "state.json").write_text('{"_data_files": "x"}')
    for folder, message in [
        (tmp_path / "dict", "holds the splits train, test; name one, such as .*/dict/train"),
        (lost, "state.json: names data-00001-of-00002.arrow, which is not there"),
        (other, "state.json: has no list '_data_files'"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            Parquet(folder, 8)
        assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", [range(4)])
    (file,) = folder.glob("*.arrow")
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable Arrow file"):
            Parquet(folder, 8)


def test_a_folder_of_tables_is_one_whole_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        pq.write_table(content(range(i, i + 1)), data / f"train-{i:05}-of-00004.parquet")
    assert [item["caption"] for item in Parquet(tmp_path, 8)] == [f"image {i}" for i in range(4)]
    pq.write_table(content(range(9, 10)), data / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"holds the splits test, train; name one, such as .*/data/train\*"):
        Parquet(tmp_path, 8)
    assert len(Parquet(f"{data}/train*", 8)) == 4
    (data / "test-00000-of-00001.parquet").unlink()
    (data / "train-00002-of-00004.parquet").unlink()
    with pytest.raises(UserError, match="lacks 1 of its shards, the first is data/train-00002-of-00004.parquet"):
        Parquet(tmp_path, 8)
    with caplog.at_level(logging.WARNING):
        assert len(Parquet(data / "train-*.parquet", 8)) == 3
    assert "lacks 1 of its shards, the first is train-00002-of-00004.parquet" in caplog.text


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train/0.tar", "test/0.tar"), "train"), (("a-train-0.tar", "a-val-0.tar"), "a-train*"),
        (("x/training.tar", "x/eval.tar"), "x/training*"), (("DEV_1.tar", "Test_1.tar"), "DEV*"),
    ],
)  # fmt: skip
def test_splits_are_told_by_names(tmp_path: Path, names: tuple[str, str], split: str) -> None:
    with pytest.raises(UserError, match="holds the splits") as caught:
        check_one_split("DIR", names)
    assert str(caught.value).endswith(f"such as DIR/{split}")
    check_one_split("DIR", [names[0], "trained.tar", "contest/0.tar", "devices-0.tar", "evaluate"])


def test_folders_of_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("test", "train"):
        write_pictures(tmp_path / split / "cat", 2)
    with pytest.raises(UserError, match="test, train are splits and not classes; name one of them, such as .*/train"):
        ImageFolder(tmp_path, 8, class_folders=True)
    assert ImageFolder(tmp_path / "train", 8, class_folders=True).class_names == ["cat"]
    write_pictures(tmp_path / "bus", 2)
    assert ImageFolder(tmp_path, 8, class_folders=True).class_names == ["bus", "test", "train"]


def test_a_folder_of_shards_is_one_split(tmp_path: Path) -> None:
    for name in ("train-0000.tar", "val-0000.tar"):
        write_tar(tmp_path / name, range(2))
    with pytest.raises(UserError, match=r"name one, such as .*/train\*"):
        IndexedShards(tmp_path, 8)
    assert len(IndexedShards(f"{tmp_path}/train*", 8)) == 2


def metadata(folder: Path, rows: list[dict[str, Any]], ending: str) -> Path:
    path = folder / f"metadata.{ending}"
    if ending == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    else:
        lines = list(map(json.dumps, rows))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_imagefolder(tmp_path: Path, ending: str) -> None:
    names = write_pictures(tmp_path / "train")
    rows = [{"file_name": name, "text": f"of {name}", "label": i % 2, "more": i} for i, name in enumerate(names)]
    metadata(tmp_path / "train", rows, ending)
    for root, before in ((tmp_path / "train", ""), (tmp_path, "train/")):
        dataset = CaptionedFolder(root, 8, columns={"caption": "text", "class_label": "label", "number": "more"})
        assert dataset.names == [before + name for name in names]
        found = [(item["caption"], item["class_label"], int(item["number"])) for item in dataset]
        assert found == [(row["text"], row["label"], row["more"]) for row in rows]
    assert [item["caption"] for item in CaptionedFolder(tmp_path, 8, columns={"caption": "text"})] == [
        row["text"] for row in rows
    ]


def test_imagefolder_of_labels_alone(tmp_path: Path) -> None:
    metadata(tmp_path, [{"file_name": name, "kind": name[-5]} for name in write_pictures(tmp_path)], "csv")
    dataset = CaptionedFolder(tmp_path, 8, columns={"class_label": "kind"})
    assert dataset[0].keys() == {"image", "class_label"} and dataset.class_names == ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="no column 'caption' for 'caption', it has file_name, kind"):
        CaptionedFolder(tmp_path, 8)


def test_folders_inside_have_metadata_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("one", "two"):
        names = write_pictures(tmp_path / folder, 3)
        metadata(
            tmp_path / folder,
            [{"file_name": f"./{name}", "caption": f"{folder} {name}"} for name in names[:2]],
            "jsonl",
        )
    with caplog.at_level(logging.WARNING):
        dataset = CaptionedFolder(tmp_path, 8)
    assert [item["caption"] for item in dataset] == ["one a.png", "one c.png", "two a.png", "two c.png"]
    assert "2 images have no row in the metadata, the first is one/sub/b.png" in caplog.text


def test_mistakes_of_imagefolders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("a/train", "a/validation", "b"):
        names = write_pictures(tmp_path / folder, 2)
        metadata(tmp_path / folder, [{"file_name": name, "caption": name} for name in names], "jsonl")
    with pytest.raises(UserError, match="holds the splits train, validation; name one, such as .*/a/train"):
        CaptionedFolder(tmp_path / "a", 8)
    (tmp_path / "b" / "metadata.csv").write_text("file_name,caption\na.png,x\n")
    with pytest.raises(UserError, match="a folder has metadata.csv and metadata.jsonl; set captions to one of them"):
        CaptionedFolder(tmp_path / "b", 8)
    assert CaptionedFolder(tmp_path / "b", 8, "metadata.csv")[0]["caption"] == "x"
    (tmp_path / "b" / "a.txt").write_text("beside it")
    with caplog.at_level(logging.WARNING):
        assert CaptionedFolder(tmp_path / "b", 8)[0]["caption"] == "beside it"
    assert "images have texts beside them, so that metadata.csv is not read" in caplog.text


def test_one_of_several_captions_is_drawn_from_arrow_too(tmp_path: Path) -> None:
    table = content(range(2), caption=[["one", "two"], ["three"]])
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path, tmp_path / "a.arrow"):
        dataset = Parquet(path, 8)
        assert {dataset[SampleKey(0, epoch)]["caption"] for epoch in range(20)} == {"one", "two"}
