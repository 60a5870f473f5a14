"""Two readers of one format agree, on data as people have them: every pair of readers, on generated files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from breakage import data as generated
from PIL import Image

from ldm.cli.inputs import list_images
from ldm.data.image_pairs.inpainting import MaskedFolder
from ldm.data.image_pairs.paired import PairedFolder
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.folders import ImageFolder
from ldm.data.readers.lsun import LSUN
from ldm.data.readers.parquet import Parquet
from ldm.data.readers.single_images import read_mask
from ldm.data.shards.shards import IndexedShards, Shards
from ldm.evaluation.image_sets import folder_images

SIDE = generated.SIDE
SEEDS = [
    *range(3),
    pytest.param(range(3, 100), marks=pytest.mark.slow, id="3-100"),
    pytest.param(range(100, 200), marks=pytest.mark.slow, id="100-200"),
]


def each(seeds: int | range) -> list[int]:
    return [seeds] if isinstance(seeds, int) else list(seeds)


def with_captions(items: list[Mapping]) -> list[tuple[str, str]]:
    """Return caption and content of items, in any order."""
    return sorted((item["caption"], item["image"].numpy().tobytes().hex()) for item in items)


@pytest.mark.parametrize("seeds", SEEDS)
def test_every_reader_of_a_folder_finds_the_same_images(tmp_path: Path, seeds: int | range) -> None:
    for seed in each(seeds):
        found = generated.tree(tmp_path / str(seed), np.random.default_rng(seed))
        root, names = found.root, found.names
        folder, captioned = ImageFolder(root, SIDE), CaptionedFolder(root, SIDE)
        assert folder.names == captioned.names == names
        assert sorted(LSUN(root, SIDE).names) == sorted(names)
        assert [str(source.path) for source in list_images(str(root), "--indir")] == [
            str(root / name) for name in names
        ]
        assert folder_images(str(root)).dataset.paths == [root / name for name in names]
        items = list(captioned)
        assert [item["caption"] for item in items] == [found.captions[name] for name in names]
        for item, alone in zip(items, folder, strict=True):
            assert torch.equal(item["image"], alone["image"])
        assert folder.contents == captioned.contents and folder.contents.count == len(names)

        (root.parent / "list.txt").write_bytes(generated.written("\n".join(names), np.random.default_rng(seed)))
        assert ImageFolder(root, SIDE, list_file=root.parent / "list.txt").names == names
        tar = generated.tar_of(found, root.parent / "all.tar")
        indexed, streamed = IndexedShards(tar, SIDE), Shards(tar, SIDE)
        assert with_captions(list(indexed)) == with_captions(list(streamed)) == with_captions(items)


@pytest.mark.parametrize("seeds", SEEDS)
def test_every_reader_of_a_table_takes_the_same_rows(tmp_path: Path, seeds: int | range) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for i in range(8):
        generated.image(np.random.default_rng(i)).save(tmp_path / f"{i}.png")
    columns = {"caption": "caption", "class_label": "label"}
    for seed in each(seeds):
        rng = np.random.default_rng(seed)
        found = generated.rows(rng)
        if not found.kept:
            continue
        content = {name: [row[name] for row in found.rows] for name in ("caption", "label")}
        images = [
            {"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": row["file"]} for i, row in enumerate(found.rows)
        ]
        table = pa.table({"image": images, **{name: list(map(str, values)) for name, values in content.items()}})
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
        with pa.ipc.new_stream(str(tmp_path / "t.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        tables = [generated.write_table(found, tmp_path / f"t.{kind}", rng) for kind in ("csv", "tsv", "jsonl")]
        readers = [CaptionedFolder(tmp_path, SIDE, path, columns) for path in tables]
        for kind in ("csv", "jsonl"):
            folder = tmp_path / f"{seed} {kind}"
            folder.mkdir()
            for i in range(8):
                (folder / f"{i}.png").symlink_to(tmp_path / f"{i}.png")
            generated.write_table(found, folder / f"metadata.{kind}", rng)
            readers.append(CaptionedFolder(folder, SIDE, columns={"class_label": "label"}))
        if all(row["file"] for row in found.rows):  # a file of no name has bytes in Parquet and Arrow
            readers += [Parquet(tmp_path / f"t.{kind}", SIDE, columns) for kind in ("parquet", "arrow")]
        first = [(item["caption"], item["class_label"]) for item in readers[0]]
        assert [caption for caption, _ in first] == [row["caption"].strip() for row in found.kept]
        for reader in readers:
            assert [(item["caption"], item["class_label"]) for item in reader] == first
            assert reader.class_names == readers[0].class_names
            names = [str(row["label"]).strip() for row in found.kept]
            labels = (
                [float(name) for name in names]
                if not reader.class_names
                else list(map(reader.class_names.index, names))
            )
            assert [label for _, label in first] == labels


@pytest.mark.parametrize("seeds", SEEDS)
def test_stream_and_index_take_the_same_samples_of_a_tar(tmp_path: Path, seeds: int | range) -> None:
    for seed in each(seeds):
        path = tmp_path / f"{seed}.tar"
        texts = generated.tar(path, np.random.default_rng(seed))
        if not texts:
            continue
        indexed, streamed = IndexedShards(path, SIDE), Shards(path, SIDE)
        items = [indexed[i] for i in range(len(indexed))]
        kept = [item for i, item in enumerate(items) if not indexed.errors.is_unreadable(i)]
        assert [item["caption"] for item in kept] == texts
        both = zip(kept, streamed, strict=True)
        assert all(a["caption"] == b["caption"] and torch.equal(a["image"], b["image"]) for a, b in both)
        assert indexed.errors.num_unreadable == streamed.errors.num_unreadable


@pytest.mark.parametrize("seeds", [0, pytest.param(range(1, 20), marks=pytest.mark.slow, id="1-20")])
def test_training_and_scripts_read_the_same_hole(tmp_path: Path, seeds: int | range) -> None:
    (tmp_path / "images").mkdir()
    for seed in each(seeds):
        rng, masks = np.random.default_rng(seed), tmp_path / f"masks{seed}"
        masks.mkdir()
        written = {kind: generated.mask(masks / kind, kind, rng) for kind in generated.MASKS}
        for kind in written:
            Image.new("RGB", (2 * SIDE, SIDE)).save(tmp_path / "images" / f"{kind}.png")
        dataset = MaskedFolder(tmp_path / "images", [SIDE, 2 * SIDE], masks)
        for name, item in zip(dataset.names, dataset, strict=True):
            file, hole = written[name.removesuffix(".png")]
            assert np.array_equal(item["mask"][0] > 0, hole), file
            assert np.array_equal(read_mask(file, hole.shape)[0], hole), file
        assert dataset.errors.num_empty == dataset.errors.num_unreadable == 0


def test_pairs_of_a_tree_are_those_of_its_readers(tmp_path: Path) -> None:
    for seed in range(3):
        found = generated.tree(tmp_path / str(seed), np.random.default_rng(seed))
        (tmp_path / f"{seed}" / "targets").symlink_to(found.root, target_is_directory=True)
        for name in found.names:
            path = found.root / f"{name.rpartition('.')[0]}_edges.png"
            generated.image(np.random.default_rng(0)).save(path)
        pairs = PairedFolder(found.root, SIDE, found.root, key="edges", suffix="_edges")
        assert pairs.names == found.names and all(item["edges"].shape == (3, SIDE, SIDE) for item in pairs)
