"""Tags in another order each epoch: as a function of the sample alone, in every reader of captions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from picture_files import write_pictures, write_tar

from ldm.data.core.module import DataModule
from ldm.data.core.tags import ShuffledTags
from ldm.data.core.transforms import SampleKey
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.folders import ImageFolder
from ldm.data.shards.shards import IndexedShards, Shards
from ldm.errors import UserError

TAGS = [f"t{i}" for i in range(12)]
CAPTION = ", ".join(TAGS)


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(i, epoch, seed) for i in range(count) for epoch in range(3) for seed in range(2)]


def test_the_first_stay_and_the_rest_is_shuffled() -> None:
    shuffled = [ShuffledTags(keep=2)(CAPTION, key).split(", ") for key in keys(10)]
    assert all(tags[:2] == TAGS[:2] and sorted(tags) == sorted(TAGS) for tags in shuffled)
    assert len(set(map(tuple, shuffled))) == len(shuffled)
    assert len({tags[2] for tags in shuffled}) == 10  # each comes to the front


def test_tags_are_dropped_at_their_rate_but_never_all() -> None:
    found = [ShuffledTags(keep=1, drop=0.3)(CAPTION, key).split(", ") for key in keys(100)]
    counts = Counter(tag for tags in found for tag in tags)
    assert counts["t0"] == len(found)
    assert all(abs(counts[tag] / len(found) - 0.7) < 0.1 for tag in TAGS[1:])
    assert {ShuffledTags(drop=1.0)("a, b", key) for key in keys(10)} == {"a", "b"}
    assert ShuffledTags(keep=1, drop=1.0)("a, b", SampleKey(0)) == "a"


@pytest.mark.parametrize(
    ("caption", "options", "want"),
    [("", {}, ""), ("one tag", {}, "one tag"), (" a ,, b,", {"keep": 2}, "a, b"), (" , ", {"drop": 1.0}, ""),
     ("a b c", {"keep": 3, "separator": " "}, "a b c"), ("a;b", {"keep": 9, "separator": ";"}, "a; b")],
)  # fmt: skip
def test_captions_of_every_kind(caption: str, options: dict[str, Any], want: str) -> None:
    assert ShuffledTags(**options)(caption, SampleKey(3)) == want


def make(kind: str, folder: Path, **options: Any) -> Any:
    if kind == "folder":
        for name in write_pictures(folder):
            (folder / name).with_suffix(".txt").write_text(CAPTION)
        return CaptionedFolder(folder, 8, **options)
    write_tar(folder / "a.tar", range(4), lambda i: {"txt": CAPTION.encode()})
    return (IndexedShards if kind == "index" else Shards)(folder / "a.tar", 8, **options)


@pytest.mark.parametrize("kind", ["folder", "index", "stream"])
def test_every_reader_shuffles_alike_and_crops_as_before(tmp_path: Path, kind: str) -> None:
    plain, shuffled = (
        make(kind, tmp_path / name, crop="random", tags=tags) for name, tags in (("a", None), ("b", ShuffledTags(2)))
    )
    assert list(shuffled.texts()) == [CAPTION] * 4  # of which a tokenizer learns every tag
    for number, (before, after) in enumerate(zip(plain, shuffled, strict=True)):
        assert after["caption"] == ShuffledTags(2)(CAPTION, SampleKey(number)) != before["caption"] == CAPTION
        assert before["image"].equal(after["image"])


def test_epochs_differ_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    dataset = make("folder", tmp_path, tags=ShuffledTags(1, 0.2))

    def captions(epoch: int, start: int) -> list[str]:
        loader = DataModule(1, train=dataset, num_workers=0, seed=3).train_loader()
        loader.load_state_dict({"epoch": epoch, "samples": start})
        return [caption for batch in loader for caption in batch["caption"]]

    assert captions(1, 2) == captions(1, 0)[2:] and captions(0, 0) != captions(1, 0)


def test_mistakes(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    with pytest.raises(UserError, match="tags are those of captions, ImageFolder has none"):
        ImageFolder(tmp_path, 8, tags=ShuffledTags())[0]
    with pytest.raises(UserError, match="separator is empty"):
        ShuffledTags(separator="")
