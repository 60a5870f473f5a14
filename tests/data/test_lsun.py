import logging
import pickle

import pytest
import torch
from picture_files import pixels, png
from torch.utils.data import DataLoader

from ldm.data.readers.lsun import LSUN
from ldm.errors import UserError

KEYS = ["00a1", "00b2", "ff03"]


def write_lmdb(folder, values):
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(folder), map_size=2**22)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    environment.close()
    return folder


def pictures():
    return {key: png(pixels(i)) for i, key in enumerate(KEYS)}


def test_lmdb_and_exports_give_the_same(tmp_path):
    from_lmdb = LSUN(write_lmdb(tmp_path / "church_outdoor_train_lmdb", pictures()), 8)
    for key, content in pictures().items():
        for folder in (tmp_path / "flat", tmp_path / "nested" / "/".join(key[:3])):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{key}.png").write_bytes(content)
    assert from_lmdb.names == KEYS
    for other in (LSUN(tmp_path / "flat", 8), LSUN(tmp_path / "nested", 8), pickle.loads(pickle.dumps(from_lmdb))):
        assert len(other) == 3
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(from_lmdb, other, strict=True))


def test_workers_open_their_own(tmp_path):
    root = write_lmdb(tmp_path / "db", {f"{i:04}": png(pixels(i)) for i in range(12)})
    train = LSUN(root, 8, split="train", validation_share=0.5)
    validation = LSUN(root, 8, split="validation", validation_share=0.5)
    assert train[0]["image"].shape == (3, 8, 8)  # so that this process has it open
    for dataset in (train, validation):
        assert sum(len(batch) for batch in DataLoader(dataset, num_workers=1, collate_fn=list)) == len(dataset)


def test_published_lists_fit_every_layout(tmp_path, caplog):
    root = write_lmdb(tmp_path / "db", pictures())
    (tmp_path / "nested" / "f").mkdir(parents=True)
    (tmp_path / "nested" / "f" / "ff03.png").write_bytes(png(pixels(0)))
    (tmp_path / "list.txt").write_text("ff03.webp\n00a1.webp\n")
    assert LSUN(root, 8, list_file=tmp_path / "list.txt").names == ["ff03", "00a1"]
    with caplog.at_level(logging.WARNING):
        assert LSUN(tmp_path / "nested", 8, list_file=tmp_path / "list.txt").names == ["f/ff03.png"]
    assert "1 of 2 images are not there, first 00a1.webp" in caplog.text
    (tmp_path / "list.txt").write_text("other.webp\n")
    with pytest.raises(UserError, match="none of its 1 images is among the 3 there, as other.webp"):
        LSUN(root, 8, list_file=tmp_path / "list.txt")


def test_broken_values_are_skipped_and_named(tmp_path, caplog):
    dataset = LSUN(write_lmdb(tmp_path / "db", pictures() | {"00b2": b"broken"}), 8)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(dataset[1]["image"], dataset[2]["image"])
    assert dataset.errors.num_unreadable == 1 and "00b2 cannot be read" in caplog.text


def test_a_database_that_is_cut_off_is_named_and_ends_no_process(tmp_path):
    root = write_lmdb(tmp_path / "db", {f"{i:04}": png(pixels(i)) * 20 for i in range(30)})
    data = root / "data.mdb"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(UserError, match="data.mdb: is cut off"):
        LSUN(root, 8)


def test_mistakes_are_named(tmp_path):
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(b"no database")
    with pytest.raises(UserError, match="not a readable LMDB"):
        LSUN(tmp_path, 8)
    with pytest.raises(UserError, match="no such folder"):
        LSUN(tmp_path / "absent", 8)
