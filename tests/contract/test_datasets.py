"""Every data set that the package has keeps the batch contract."""

import importlib
import inspect
import pickle
import pkgutil

import numpy as np
import pytest
import torch
from picture_files import pixels, png, write_pictures, write_tar
from task_data import make_task_data
from torch.utils.data import DataLoader, Dataset, IterableDataset

import ldm.data
import ldm.toy
from ldm.data.core.base import ImageDataset
from ldm.data.core.buckets import Bucketed
from ldm.data.core.latents import CachedLatents, LatentFiles
from ldm.data.core.loader import collate
from ldm.data.core.module import DataModule
from ldm.data.image_pairs.paired import TargetFolder
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.folders import ImageFolder
from ldm.data.readers.imagenet import ImageNet
from ldm.data.readers.lsun import LSUN
from ldm.data.readers.neighbours import RetrievalFolder
from ldm.data.readers.parquet import Parquet
from ldm.data.shards.shards import IndexedShards, Shards
from ldm.toy.shapes import Shapes
from ldm.toy.thumbnails import ThumbnailNeighbours

COUNT, SIZE = 6, 16
KEEP_FILES_OPEN = (LSUN, IndexedShards, Shards)  # what forked workers must not share
AUGMENTED = {"crop": "random", "flip": 0.5, "resize": "none"}


def make(cls, folder):
    """Build a small data set of the class, with COUNT items."""
    if cls is ImageFolder:
        write_pictures(folder, COUNT, height=24)
        return cls(folder, SIZE, **AUGMENTED)
    if cls is Bucketed:
        write_pictures(folder, COUNT, height=24)
        return cls(ImageFolder(folder, SIZE, crop="random", flip=0.5), multiple=SIZE)
    if cls is ImageNet:
        write_pictures(folder / "n01440764", COUNT, height=24)
        return cls(folder, SIZE, **AUGMENTED)
    if cls is LSUN:
        lmdb = pytest.importorskip("lmdb")
        environment = lmdb.open(str(folder), map_size=2**20)
        with environment.begin(write=True) as transaction:
            for i in range(COUNT):
                transaction.put(f"{i:04}".encode(), png(pixels(i, height=24)))
        environment.close()
        return cls(folder, SIZE, **AUGMENTED)
    if cls is Parquet:
        table = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        content = {
            "image": [png(pixels(i, height=24)) for i in range(COUNT)],
            "caption": [f"p {i}" for i in range(COUNT)],
        }
        parquet.write_table(table.table(content), folder / "a.parquet", row_group_size=4)
        return cls(folder, SIZE, **AUGMENTED)
    if cls is CaptionedFolder:
        names = write_pictures(folder, COUNT, height=24)
        rows = "".join(f"{name},picture {name},{i}\n" for i, name in enumerate(names))
        (folder / "table.csv").write_text(f"file,caption,label\n{rows}")
        return cls(folder, SIZE, captions="table.csv", columns={"class_label": "label"}, **AUGMENTED)
    if cls in (IndexedShards, Shards):
        write_tar(folder / "a.tar", range(3))
        write_tar(folder / "b.tar", range(3, COUNT))
        return cls(folder, SIZE, {"caption": "txt", "class_label": "json.class"}, **AUGMENTED)
    if cls is RetrievalFolder:
        names = write_pictures(folder, COUNT, height=24)
        paths = [str(folder / name) for name in names]
        np.savez(folder / "database.npz", embedding=np.eye(COUNT), path=paths)
        return cls(folder, SIZE, folder / "database.npz", num_neighbours=2, **AUGMENTED)
    if cls is Shapes:
        return cls(COUNT, SIZE)
    if cls is ThumbnailNeighbours:
        return cls(Shapes(COUNT, SIZE), Shapes(8, SIZE, seed=1), num_neighbours=2)
    if cls is CachedLatents:
        files = LatentFiles(folder / "latents", "key", COUNT, rows=COUNT)
        texts = [f"picture {i}" for i in range(COUNT)]
        labels = torch.arange(COUNT)
        files.write(0, [{"moments": torch.randn(COUNT, 8, 4, 4), "caption": texts, "class_label": labels}])
        return cls(files)
    dataset = make_task_data(cls, folder, COUNT, SIZE, **AUGMENTED)
    if dataset is not None:
        return dataset
    raise AssertionError(f"{cls.__name__} is new: add a small one here, so that it is tested")


def found():
    classes = set()
    for package in (ldm.data, ldm.toy):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for _, cls in inspect.getmembers(module, inspect.isclass):
                if issubclass(cls, Dataset) and cls.__module__ == module.__name__ and not inspect.isabstract(cls):
                    classes.add(cls)
    return sorted(classes - {ImageDataset, TargetFolder}, key=lambda cls: cls.__name__)


@pytest.fixture(params=found(), ids=lambda cls: cls.__name__)
def dataset(request, tmp_path):
    return make(request.param, tmp_path)


def items(dataset):
    return list(dataset) if isinstance(dataset, IterableDataset) else [dataset[i] for i in range(len(dataset))]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]


def test_items_hold_images_and_plain_values(dataset):
    found_items = items(dataset)
    assert len(found_items) == COUNT
    for item in found_items:
        if isinstance(dataset, CachedLatents):
            assert item["moments"].shape == (8, 4, 4)
        else:
            image = item["image"]
            assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32 and image.is_contiguous()
            assert image.min() >= -1 and image.max() <= 1 and image.min() < image.max()
        assert item.keys() == found_items[0].keys()
        assert all(isinstance(key, str) for key in item)
        assert isinstance(item.get("caption", ""), str) and isinstance(item.get("class_label", 0), int)


def test_the_same_item_comes_again(dataset):
    for first, second in zip(items(dataset), items(dataset), strict=True):
        assert_equal(first, second)


def test_a_pickled_copy_is_the_same(dataset):
    for first, second in zip(items(dataset), items(pickle.loads(pickle.dumps(dataset))), strict=True):
        assert_equal(first, second)


def test_items_do_not_depend_on_global_generators(dataset):
    before = items(dataset)
    state = torch.get_rng_state()
    torch.manual_seed(1234)
    for first, second in zip(before, items(dataset), strict=True):
        assert_equal(first, second)
    torch.set_rng_state(state)


def test_batches(dataset):
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=collate)))
    assert all(len(value) == 4 for value in batch.values())
    assert all(isinstance(caption, str) for caption in batch.get("caption", []))
    assert batch.get("class_label", torch.zeros(4, dtype=torch.int64)).dtype == torch.int64


def test_at_least_the_known_data_sets_are_found():
    assert {ImageFolder, Parquet, Shards, CachedLatents, Shapes} <= set(found())


def test_data_module_reads_every_item_once(dataset):
    read_every_item_once(dataset, num_workers=0)


@pytest.mark.parametrize(
    "cls", [cls if cls in KEEP_FILES_OPEN else pytest.param(cls, marks=pytest.mark.slow) for cls in found()]
)
def test_two_workers_read_every_item_once(cls, tmp_path):
    read_every_item_once(make(cls, tmp_path), num_workers=2)


def read_every_item_once(dataset, num_workers):
    is_for_training = isinstance(dataset, Bucketed)
    module = DataModule(2, train=dataset, validation=None if is_for_training else dataset, num_workers=num_workers)
    batches = list(module.train_loader() if is_for_training else module.validation_loader())
    main = "moments" if isinstance(dataset, CachedLatents) else "image"
    assert sum(len(batch[main]) for batch in batches) == COUNT
    assert len(module.shape_summary()) == (1 if is_for_training else 2)
    if "caption" in batches[0]:
        captions = {caption for batch in batches for caption in batch["caption"]}
        assert captions == set(module.train_texts()) == {item["caption"] for item in items(dataset)}


def test_positions_outside_end_an_iteration(dataset):
    if isinstance(dataset, IterableDataset):
        pytest.skip("a stream has no positions")
    with pytest.raises(IndexError):
        dataset[COUNT]
