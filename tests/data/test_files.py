"""Files as people have them: each rule of the readers by itself; `tests/breakage` compares them with each other."""

import json
import logging
import os
import time

import numpy as np
import pytest
import torch
from picture_files import pixels, png, write_pictures, write_tar
from PIL import Image

from ldm.cli.entry import expand_homes
from ldm.cli.inputs import list_masked, read_prompts
from ldm.data.core.base import positions_in_split
from ldm.data.core.files import decode_text, find_images, find_tables, image_endings, is_litter, read_json
from ldm.data.core.loader import collate
from ldm.data.core.module import DataModule
from ldm.data.core.transforms import ImageTransform, SampleKey
from ldm.data.image_pairs import paired_files
from ldm.data.image_pairs.inpainting import MaskedFolder
from ldm.data.image_pairs.paired_files import read_hole, read_indices
from ldm.data.image_pairs.super_resolution import LowRes
from ldm.data.layout.annotations import read_coco
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.columns import whole_number
from ldm.data.readers.folders import ImageFolder
from ldm.data.readers.neighbours import RetrievalFolder
from ldm.data.readers.parquet import Parquet
from ldm.data.readers.single_images import read_mask
from ldm.data.shards.shards import IndexedShards, Shards
from ldm.errors import UserError


def test_endings_are_those_that_pillow_decodes():
    assert {
        ".jpg",
        ".jfif",
        ".jpe",
        ".jp2",
        ".avif",
        ".apng",
        ".mpo",
        ".webp",
        ".tiff",
        ".pbm",
        ".tga",
    } <= image_endings()
    assert not {".pdf", ".mpg", ".h5", ".hdf", ".eps", ".txt", ".npy"} & image_endings()


def test_other_images_and_pipes_are_counted_and_named(tmp_path, caplog):
    write_pictures(tmp_path, 2)
    for name in ("x.heic", "y.HEIC", "sub/z.nef"):
        (tmp_path / name).write_bytes(b"?")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path / "absent", tmp_path / "gone.png")
    os.symlink("itself", tmp_path / "itself")
    with caplog.at_level(logging.WARNING):
        assert find_images(tmp_path) == ["a.png", "gone.png", "sub/b.png"]
    assert "2 .heic, 1 .nef" in caplog.text and "sub/z.nef" in caplog.text
    assert "3 are pipes, devices or links to nothing, the first is gone.png" in caplog.text


def test_a_pipe_in_a_list_or_beside_an_image_ends_nothing(tmp_path, caplog):
    write_pictures(tmp_path, 3)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("a.png\npipe.png\n")
    dataset = ImageFolder(tmp_path, 8, list_file=tmp_path / "list.txt")
    assert torch.equal(dataset[1]["image"], dataset[0]["image"]) and dataset.errors.num_unreadable == 1
    for name in ("a", "sub/b"):
        (tmp_path / f"{name}.txt").write_text("text")
    os.mkfifo(tmp_path / "c.txt")
    assert [item["caption"] for item in CaptionedFolder(tmp_path, 8)] == ["text"] * 3


@pytest.mark.parametrize(
    ("name", "litter"),
    [("a/._b.png", True), ("__MACOSX/a.png", True), ("a/Thumbs.db", True), ("Desktop.ini", True), (".DS_Store", True)]
    + [("@eaDir/a.png", True), ("$RECYCLE.BIN/a.png", True)]
    + [("./a.png", False), ("../a.png", False), ("a/_b.png", False), (".cache/a.png", False), ("thumbs.db.png", False)],
)
def test_litter(name, litter):
    assert is_litter(name) is litter


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_without_the_marks_of_its_encoding(tmp_path, encoding):
    assert decode_text("é\r\nb\rc".encode(encoding)) == "é\nb\nc"
    path = tmp_path / "p.txt"
    path.write_bytes("a red ball\r\n\r\n a hat\r\n".encode(encoding))
    assert read_prompts(str(path)) == ["a red ball", "a hat"]
    (tmp_path / "empty.txt").write_bytes("".encode("utf-8-sig"))
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "é"}]}
    path.write_bytes(json.dumps(coco, ensure_ascii=False).encode(encoding))
    assert read_coco([path]).class_names == ["é"]


def test_brackets_and_braces_in_the_names_of_folders(tmp_path):
    folder = tmp_path / "br[a]ck{1,2}"
    for i in range(2):
        write_tar(folder / f"x-000{i}.tar", [i])
    for urls in (folder, folder / "*.tar", folder / "x-{0000..0001}.tar", folder / "x-000[01].tar"):
        assert len(IndexedShards(urls, 8)) == 2
    assert find_tables(str(folder / "x-0000.tar"), ".tar", "", "") == [str(folder / "x-0000.tar")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "file,caption\na.png,a red ball, on grass\n", "line 2 has 3 fields, the header 2"),
        ("t.csv", 'file,caption\na.png,x\nb.png,"open\nc.png,y\n', "line 3: "),
        ("t.tsv", "file\tcaption\na.png\tx\ty\n", "line 2 has 3 fields"),
        ("t.csv", "file,caption,caption\na.png,x,y\n", "line 1: 2 columns are named 'caption'"),
        ("t.jsonl", '{"file": "a.png", "caption": "x", "caption": "y"}\n', "line 1 .* a key twice"),
        (
            "t.jsonl",
            '\n{"file": "a.png", "caption": {"raw": "x", "id": 1}}\n',
            "line 2: 'caption' is a struct of raw, id",
        ),
        ("t.jsonl", '{"file": "a.png", "caption": [["x"]]}\n', "'caption' is list"),
    ],
)
def test_no_field_of_a_table_is_swallowed(tmp_path, name, text, message):
    write_pictures(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        CaptionedFolder(tmp_path, 8, name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_first_line_that_tells_a_spreadsheet_what_separates_the_fields(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "t.csv").write_text('sep=;\r\nfile;caption\r\na.png;"a ball; red, on grass"\r\n')
    assert CaptionedFolder(tmp_path, 8, "t.csv")[0]["caption"] == "a ball; red, on grass"
    (tmp_path / "t.csv").write_text("sep=;\nfile;caption\na.png;a ball; red\n")
    with pytest.raises(UserError, match="line 3 has 3 fields"):
        CaptionedFolder(tmp_path, 8, "t.csv")


def test_a_struct_of_parquet_is_no_caption(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [png(pixels(0))], "caption": [[{"raw": "x"}]]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 0: 'caption' is a struct of raw"):
        Parquet(tmp_path / "t.parquet", 8)


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_a_list_of_captions_in_a_tar_is_drawn_from(tmp_path, make):
    def files(i):
        captions = [["one", "two", "\ufeff three "], {"raw": "x"}, None, float("nan"), []][i]
        return {"json": json.dumps({"caption": captions, "label": ["3.0", 4, 5, 6, "²"][i]}).encode()}

    path = write_tar(tmp_path / "a.tar", range(5), files)
    dataset = make(path, 8, {"caption": "json.caption", "class_label": "json.label"})
    items = list(dataset)
    assert items[-1]["caption"] == "" and items[-1]["class_label"] == "²" and items[0]["class_label"] == 3
    assert dataset.errors.num_unreadable == 3
    if make is IndexedShards:
        assert {dataset[SampleKey(0, epoch)]["caption"] for epoch in range(30)} == {"one", "two", "three"}


@pytest.mark.parametrize(
    ("label", "number"),
    [
        ("7", 7),
        (" -1", -1),
        ("3.0", 3),
        (2.0, 2),
        (5, 5),
        ("²", None),
        ("", None),
        ("1e3", None),
        ("0.5", None),
        ("9" * 19, None),
        ("9" * 5000, None),
        (None, None),
    ],
)
def test_labels_that_are_numbers(label, number):
    assert whole_number(label) == number


@pytest.mark.parametrize("count", [1, 2, 3, 6, 24])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.99])
def test_both_splits_of_a_small_folder_have_a_file(count, share):
    for seed in range(20):
        names = [f"{seed}/{i}.png" for i in range(count)]
        train, validation = (positions_in_split(names, split, share) for split in ("train", "validation"))
        assert sorted([*train, *validation]) == (list(range(count)) if count > 1 else [0, 0])
        assert train and validation


def test_neighbours_keep_the_split_of_their_folder(tmp_path):
    names = write_pictures(tmp_path, 8)
    np.savez(tmp_path / "d.npz", embedding=np.eye(8, dtype=np.float32), path=[str(tmp_path / name) for name in names])
    for split in ("train", "validation"):
        options = {"split": split, "validation_share": 0.3}
        assert (
            RetrievalFolder(tmp_path, 8, tmp_path / "d.npz", 2, **options).names
            == ImageFolder(tmp_path, 8, **options).names
        )


def test_contents_tell_another_data_set_and_not_another_place(tmp_path):
    for name in ("one", "two"):
        write_pictures(tmp_path / name)
        write_tar(tmp_path / name / "a.tar", range(3))
    for make in (ImageFolder, IndexedShards, Shards):
        assert make(tmp_path / "one", 8).contents == make(tmp_path / "two", 8).contents
    folder, own = ImageFolder(tmp_path / "one", 8), [{"image": torch.zeros(3, 8, 8)}]
    contents = DataModule(1, LowRes(folder, 2), own).contents()
    assert contents == {"train": folder.contents, "validation": (1, "list")}
    before = folder.contents
    (tmp_path / "one" / "a.png").rename(tmp_path / "one" / "z.png")
    after = ImageFolder(tmp_path / "one", 8).contents
    assert after.count == before.count == 4 and after.names != before.names


@pytest.mark.parametrize("mode", ["RGB", "F"])
@pytest.mark.parametrize(("width", "height"), [(1, 20_000), (60_000, 3)])
def test_thin_images_are_cropped_before_they_are_resized(mode, width, height):
    ramp = np.linspace(0, 255, max(width, height)).astype(np.float32)
    values = np.broadcast_to(ramp if width > height else ramp[:, None], (height, width)).copy()
    transform = ImageTransform(64, crop="random", channels=3)
    started = time.perf_counter()
    got = transform(Image.fromarray(values).convert(mode), np.random.default_rng(0))
    assert got.shape == (3, 64, 64) and time.perf_counter() - started < 2
    assert got.max() - got.min() < 0.1  # a small part of the ramp


@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic", "lanczos"])
def test_a_crop_of_a_thin_image_is_that_of_the_whole(filter_name, monkeypatch):
    ramp = Image.fromarray(np.linspace(0, 255, 2000).reshape(500, 4).astype(np.uint8))
    transform = ImageTransform(32, crop="random", interpolation=filter_name)
    crop = transform.sample_crop(ramp, np.random.default_rng(0))
    thin = transform.apply(ramp, crop)
    monkeypatch.setattr("ldm.data.core.transforms._THIN", 10_000)
    torch.testing.assert_close(thin, transform.apply(ramp, crop), atol=2 / 127.5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_batches_hold_floats_of_one_type(dtype):
    batch = collate([{"image": torch.ones(3, 2, 2, dtype=dtype), "score": 0.5, "class_label": 3}] * 2)
    assert batch["image"].dtype == batch["score"].dtype == torch.float32 and batch["class_label"].dtype == torch.int64


def test_masks_that_are_the_same_everywhere_are_told(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for i, value in enumerate((0, 255)):
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"{i}.png")
        Image.new("L", (8, 8), value).save(tmp_path / "a" / f"{i}_mask.png")
        with pytest.raises(UserError, match=f"{i}_mask.png: a mask .* hole, its values are {value} to {value}"):
            read_mask(tmp_path / "a" / f"{i}_mask.png", (8, 8))
    dataset = MaskedFolder(tmp_path / "a", 8, tmp_path / "a", "_mask")
    with caplog.at_level(logging.WARNING):
        assert [float(item["mask"].mean()) for item in dataset] == [-1, 1]
    assert dataset.errors.num_empty == 2 and "0_mask.png: a mask without a hole" in caplog.text


def test_maps_of_classes_are_turned_like_images(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).save(tmp_path / "a.png", exif=exif)
    assert read_indices(tmp_path / "a.png").tolist() == [[3, 2], [1, 0]]


def test_a_pair_of_masks_for_one_image_is_named(tmp_path):
    for name in ("a.png", "a_mask.png", "a_mask.webp"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    with pytest.raises(UserError, match="a_mask.png and a_mask.webp"):
        list_masked(str(tmp_path))


def test_what_the_alpha_of_a_mask_means_is_said_once(tmp_path, caplog):
    values = np.full((2, 2, 4), 255, np.uint8)
    values[0, :, 3] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    paired_files._warn_once.cache_clear()
    assert [read_hole(tmp_path / "a.png")[0].tolist() for _ in range(2)] == [[[True, True], [False, False]]] * 2
    assert caplog.text.count("transparent is hole") == 1


def test_a_mask_of_colours_counts_its_brightest_channel(tmp_path):
    Image.fromarray(np.array([[[0, 0, 0], [200, 0, 0], [0, 0, 60]]], np.uint8)).save(tmp_path / "a.png")
    assert read_hole(tmp_path / "a.png")[0].tolist() == [[False, True, False]]


def test_one_empty_box_is_dropped_and_counted(tmp_path):
    image = {"id": 1, "file_name": "a.png", "width": 10, "height": 10}
    boxes = [{"image_id": 1, "category_id": 1, "bbox": box} for box in ([], [1, 1, 5, 5], [2, 2, 0, 3])]
    content = {"images": [image], "categories": [{"id": 1, "name": "cat"}], "annotations": boxes}
    (tmp_path / "c.json").write_text(json.dumps(content))
    annotations, counts = read_coco([tmp_path / "c.json"]).clipped(1e-5)
    assert annotations.num_boxes(0) == 1 and counts.dropped == 2


def test_homes_are_expanded_in_every_program(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = [
        "--outdir",
        "~/x",
        "--outdir=~/x",
        "data.params.train.params.root=~/x y",
        "~",
        "~300 birds",
        "a ~/x",
        "k=~",
    ]
    home = ["--outdir", "/home/me/x", "--outdir=/home/me/x", "data.params.train.params.root=/home/me/x y", "/home/me"]
    assert expand_homes(words) == [*home, "~300 birds", "a ~/x", "k=~"]


DEEP = "[" * 100_000 + "]" * 100_000


def test_json_that_is_nested_too_deep_is_one_line_or_skipped(tmp_path):
    write_pictures(tmp_path, 2)
    (tmp_path / "a.json").write_text(DEEP)
    (tmp_path / "a.jsonl").write_text(f'{{"file": "a.png", "caption": {DEEP}}}')
    for read in (lambda: read_json(tmp_path / "a.json", "--layout"), lambda: CaptionedFolder(tmp_path, 8, "a.jsonl")):
        with pytest.raises(UserError, match="nested too deep") as caught:
            read()
        assert len(str(caught.value)) <= 300
    path = write_tar(tmp_path / "a.tar", range(2), lambda i: {"json": ['{"caption": "a"}', DEEP][i].encode()})
    for make in (IndexedShards, Shards):
        dataset = make(path, 8, {"caption": "json.caption"})
        assert {item["caption"] for item in dataset} == {"a"} and dataset.errors.num_unreadable == 1
