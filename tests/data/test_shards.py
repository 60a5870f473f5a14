import logging
import tarfile

import pytest
import torch
from picture_files import pixels, png, write_tar
from torch.utils.data import DataLoader

from ldm.data.shards.shards import IndexedShards, Shards
from ldm.data.shards.tar_samples import expand_urls, index_tar, split_name
from ldm.errors import UserError

FIELDS = {"caption": "txt", "class_label": "json.class", "source": "json.meta.source"}
ALL = [f"picture {i}" for i in range(10)]


@pytest.fixture
def commands(monkeypatch):
    """Allow shards that commands write."""
    monkeypatch.setenv("LDM_ALLOW", "pipe:")


def with_size(path, field):
    """Give the second member of a tar another field of its size, with a checksum that fits."""
    with tarfile.open(path) as archive:
        start = archive.getmembers()[1].offset
    content = bytearray(path.read_bytes())
    content[start + 124 : start + 136] = field
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)


def with_headers(path, kind, body):
    """Put headers of a kind, each with a body, before what a tar holds."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, len(body)
    block = header.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0")
    path.write_bytes(block * 3000 + path.read_bytes())


MISLEADING = {
    "negative": lambda path: with_size(path, b"\xff" * 10 + b"\xfe\x00"),  # -512
    "chain": lambda path: with_headers(path, tarfile.GNUTYPE_LONGNAME, b"n\0"),
    "length": lambda path: with_headers(path, tarfile.XHDTYPE, b"99999999999999999999999 path=x\n"),
}


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4, 4 and 2 samples."""
    write_tar(tmp_path / "train-0000.tar", range(4))
    write_tar(tmp_path / "train-0001.tar", range(4, 8))
    write_tar(tmp_path / "train-0002.tar", range(8, 10))
    return tmp_path


def captions(stream):
    return [item["caption"] for item in stream]


def test_patterns_name_the_same_shards(shards, monkeypatch):
    want = [str(shards / f"train-000{i}.tar") for i in range(3)]
    for urls in (shards, f"{shards}/train-{{0000..0002}}.tar", f"{shards}/*.tar", want, [want[0], *want[1:]]):
        assert expand_urls(urls) == want
    monkeypatch.setenv("LDM_ALLOW", "pipe:")
    assert expand_urls("pipe:curl x/{1..2}.tar") == ["pipe:curl x/1.tar", "pipe:curl x/2.tar"]


@pytest.mark.parametrize("urls", ["absent.tar", "absent-*.tar", "absent-{0..1}.tar", ".empty", []])
def test_absent_shards_are_named(tmp_path, monkeypatch, urls):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".empty").mkdir()
    with pytest.raises(UserError, match="set urls to tar files, a folder of them, or a pattern"):
        expand_urls(urls)


def test_names_split_at_the_first_dot():
    assert split_name("a.b/0001.left.PNG") == ("a.b/0001", "left.png")


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_fields_and_images_arrive(shards, make):
    items = list(make(shards, [12, 16], FIELDS))
    assert [item["caption"] for item in items] == ALL
    assert [item["class_label"] for item in items] == [i % 3 for i in range(10)]
    assert items[3]["source"] == "test"
    want = torch.from_numpy(pixels(7)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(items[7]["image"], want)


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_texts_are_listed(shards, make):
    assert list(make(shards, 8).texts()) == ALL
    with pytest.raises(UserError, match="no text under 'class_label'"):
        next(make(shards, 8, FIELDS).texts("class_label"))


@pytest.mark.parametrize("make", [IndexedShards, Shards])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"caption": "text"}, "0000 has no text for 'caption', it has json, png, txt; set fields.caption, or"),
        ({"y": "json.label"}, "json has no label for 'y', it has class, meta; set fields.y"),
        ({"y": "json.class.name"}, "it has int"),
        ({"y": "json.meta"}, "json.meta for 'y' is a struct of source, neither text nor a number"),
        ({"image": "jpg"}, "no sample"),
    ],
)
def test_wrong_fields_are_named_in_one_line(tmp_path, make, fields, message):
    path = write_tar(tmp_path / "a.tar", range(2))
    if make is Shards and fields == {"caption": "text"}:
        message = "has no text for 'caption'"  # the stream leaves out members that nothing asks for
    with pytest.raises(UserError, match=message) as caught:
        next(iter(make(path, 8, fields)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_images_only_need_no_text(tmp_path, make):
    path = write_tar(tmp_path / "a.tar", range(2), lambda i: {"txt": None, "json": None})
    assert [set(item) for item in make(path, 8, {})] == [{"image"}, {"image"}]


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_named_image_of_several(tmp_path, make):
    def files(i):
        return {"left.png": png(pixels(20 + i))}

    path = write_tar(tmp_path / "a.tar", range(2), files)
    for fields, first in (({}, 0), ({"image": "left.png"}, 20)):
        want = torch.from_numpy(pixels(first)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(next(iter(make(path, [12, 16], fields)))["image"], want)


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_damaged_samples_are_skipped_counted_and_named_once(tmp_path, make, caplog):
    damaged = {1: {"png": b"no picture"}, 2: {"json": b"{"}}
    path = write_tar(tmp_path / "a.tar", range(5), lambda i: damaged.get(i, {}))
    dataset = make(path, 8, FIELDS)
    with caplog.at_level(logging.WARNING):
        found = [captions(dataset) for _ in range(2)][1]
    replaced = ["picture 3"] * 2 if make is IndexedShards else []
    assert found == ["picture 0", *replaced, "picture 3", "picture 4"]
    assert dataset.errors.num_unreadable == 2
    assert len([record for record in caplog.records if "cannot be read and is skipped" in record.getMessage()]) == 2


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_empty_captions_are_counted_and_the_first_named(tmp_path, make, caplog):
    path = write_tar(tmp_path / "a.tar", range(5), lambda i: {"txt": b" \n"} if i % 2 else {})
    dataset = make(path, 8)
    with caplog.at_level(logging.WARNING):
        assert captions(dataset) == captions(dataset) == ["picture 0", "", "picture 2", "", "picture 4"]
    assert dataset.errors.num_empty == 2 and dataset.errors.num_unreadable == 0
    assert [record.getMessage() for record in caplog.records if "empty" in record.getMessage()] == [
        f"{path}: 0001: its caption is empty; such images train the model without condition"
    ]


@pytest.mark.parametrize("make", [IndexedShards, Shards])
@pytest.mark.parametrize("content", [b"no tar" * 100, b""])
def test_damaged_shards_are_skipped_and_refused_if_there_is_no_other(shards, make, content, caplog):
    (shards / "train-0001.tar").write_bytes(content)
    dataset = make(shards, 8)
    with caplog.at_level(logging.WARNING):
        found = captions(dataset)
    assert list(dict.fromkeys(found)) == ALL[:4] + ALL[8:] and dataset.errors.num_unreadable == 1
    assert "train-0001.tar: the rest of it cannot be read" in caplog.text
    with pytest.raises(UserError, match="no sample .*train-0001.tar"):
        captions(make(shards / "train-0001.tar", 8))


@pytest.mark.parametrize("make", [IndexedShards, Shards])
def test_of_a_tar_that_is_cut_off_the_beginning_is_read(tmp_path, make):
    path = write_tar(tmp_path / "a.tar", range(10))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 300])
    dataset = make(path, 8)
    found = list(dict.fromkeys(captions(dataset)))
    assert found == ALL[: len(found)] and 3 <= len(found) <= 6
    assert 1 <= dataset.errors.num_unreadable <= 2  # the sample that is cut, and the rest of the tar


@pytest.mark.parametrize("url", ["pipe:cat {}", "file:{}"])
@pytest.mark.usefixtures("commands")
def test_sources_that_webdataset_opens(shards, url):
    assert captions(Shards([url.format(shards / f"train-000{i}.tar") for i in range(3)], 8)) == ALL


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {}",
        "PIPE:touch {}",
        "{{pipe,x}}:touch {}",
        "http://x/';touch {};'",
        "http://x/`touch {}`",
        "s3://$(touch {})",
    ],
)
def test_no_address_runs_a_command_unasked(tmp_path, url):
    made = tmp_path / "made"
    with pytest.raises(UserError, match="--allow pipe:|no address"):
        list(Shards(url.format(made), 8))
    assert not made.exists()


def test_sizes_and_headers_that_mislead_end_the_tar(tmp_path):
    """A negative size leads back in the file; what tarfile raises for headers is not TarError alone."""
    for name, edit in MISLEADING.items():
        path = write_tar(tmp_path / f"{name}.tar", range(4))
        edit(path)
        samples, problem = index_tar(str(path))
        assert problem and len(samples) < 4, name


@pytest.mark.usefixtures("commands")
def test_a_source_that_fails_is_named(shards, caplog):
    dataset = Shards(["pipe:cat absent.tar", str(shards / "train-0000.tar")], 8)
    assert captions(dataset) == ALL[:4] and dataset.errors.num_unreadable == 1
    assert "pipe:cat absent.tar: the rest of it cannot be read" in caplog.text
    with pytest.raises(UserError, match="pipe:cat absent.tar: no sample of the 1 shards can be read"):
        captions(Shards("pipe:cat absent.tar", 8))


def test_index_splits_by_name(shards):
    parts = [captions(IndexedShards(shards, 8, split=split, validation_share=0.4)) for split in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == ALL and all(parts)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_plain_loader_reads_every_sample_once(shards, num_workers):
    assert sorted(captions(DataLoader(Shards(shards, 8), batch_size=None, num_workers=num_workers))) == ALL


def test_number_of_shuffle_streams(shards):
    assert (Shards(shards, 8).shuffle_streams, Shards(shards, 8, shuffle_streams=3).shuffle_streams) == (2, 3)
    with pytest.raises(UserError, match="shuffle_streams=4 must be 1 to 3, the number of shards"):
        Shards(shards, 8, shuffle_streams=4)
