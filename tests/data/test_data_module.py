import logging

import pytest
import torch
from picture_files import write_pictures, write_tar
from ranks import as_rank
from torch.utils.data import Dataset

from ldm.data.core.loader import collate
from ldm.data.core.module import DataModule
from ldm.data.core.sampler import EpochSampler, epoch_order
from ldm.data.image_pairs.super_resolution import LowRes
from ldm.data.readers.folders import ImageFolder
from ldm.data.shards.shards import IndexedShards, Shards
from ldm.errors import UserError


class Numbers(Dataset):
    """A data set that knows nothing of draws."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": torch.full((1, 2, 2), float(index)), "caption": f"number {index}", "class_label": index}


def labels(loader):
    return [batch["class_label"].tolist() for batch in loader]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("even", [False, True])
def test_ranks_share_an_epoch(world, even):
    parts = [epoch_order(10, 5, 2, rank, world, even=even).tolist() for rank in range(world)]
    alone = epoch_order(10, 5, 2)[: 10 // world * world if even else 10]
    assert parts == [alone[rank::world].tolist() for rank in range(world)]  # position p is read by rank p % world
    assert len({len(part) for part in parts}) == 1 or not even


def test_order_is_a_function_of_seed_and_epoch():
    orders = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]
    assert epoch_order(3, 0, 0, shuffle=False, even=False, world=2, rank=0).tolist() == [0, 2]


def test_evaluation_sampler_draws_the_same_every_epoch():
    sampler = EpochSampler(4, evaluation=True)
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first and [draw.index for draw in first] == [0, 1, 2, 3]


def test_collate_stacks_numbers_and_keeps_texts():
    items = [{"image": torch.ones(3, 2, 2), "caption": c, "class_label": i, "boxes": [i]} for i, c in enumerate("ab")]
    batch = collate(items)
    assert batch["image"].shape == (2, 3, 2, 2) and batch["caption"] == ["a", "b"] and batch["boxes"] == [[0], [1]]
    assert batch["class_label"].dtype == torch.int64
    with pytest.raises(UserError, match="not every item has the key 'caption'"):
        collate([items[0], {"image": torch.ones(3, 2, 2)}])
    with pytest.raises(UserError, match="items do not fit together under 'image'"):
        collate([items[0], {**items[1], "image": torch.ones(3, 2, 3)}])


def test_train_is_shuffled_and_drops_the_rest_validation_is_whole():
    module = DataModule(4, Numbers(10), Numbers(10), Numbers(3))
    loader = module.train_loader()
    first, second = labels(loader), labels(loader)
    assert first == second and len(loader) == len(first) == 2  # an epoch is what set_epoch says, however often iterated
    loader.set_epoch(1)
    assert labels(loader) != first
    assert labels(module.validation_loader()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert labels(module.test_loader()) == [[0, 1, 2]]
    assert DataModule(4, Numbers(10)).validation_loader() is None
    assert labels(DataModule(4, Numbers(6), shuffle=False, drop_last=False).train_loader()) == [[0, 1, 2, 3], [4, 5]]


def test_accumulated_batches_see_what_one_large_batch_sees():
    large, loader = DataModule(4, Numbers(14)).train_loader(), DataModule(2, Numbers(14)).train_loader(accumulate=2)
    assert len(loader) == 6 and sum(labels(loader), []) == sum(labels(large), [])
    loader.load_state_dict({"epoch": 0, "samples": 8})
    assert sum(labels(loader), []) == labels(large)[2]
    with pytest.raises(UserError, match="3 items do not fill 2 batches of 2"):
        len(DataModule(2, Numbers(3)).train_loader(accumulate=2))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentations_do_not_depend_on_workers_and_change_per_epoch(tmp_path, num_workers):
    write_pictures(tmp_path, 6)
    dataset = ImageFolder(tmp_path, 4, crop="random", resize="none", flip=0.5)
    loader = DataModule(2, dataset, num_workers=num_workers).train_loader()
    alone = DataModule(2, dataset, num_workers=0).train_loader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        alone.set_epoch(epoch)
        epochs.append(torch.cat([batch["image"] for batch in loader]))
        assert torch.equal(epochs[-1], torch.cat([batch["image"] for batch in alone]))
    by_content = [sorted(image.sum().item() for image in images) for images in epochs]
    assert by_content[0] != by_content[1]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_another_loader_goes_on_in_mid_epoch(stop):
    module = DataModule(2, Numbers(10), seed=3)
    loader = module.train_loader()
    loader.set_epoch(4)
    whole = labels(loader)
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    state = loader.state_dict()
    assert state == {"epoch": 4, "samples": 2 * stop}
    resumed = module.train_loader()
    resumed.load_state_dict(state)
    resumed.sampler.set_epoch(4)  # as Lightning does at the start of each epoch
    assert resumed.state_dict() == state and len(resumed) == 5
    assert labels(resumed) == whole[stop:]
    resumed.sampler.set_epoch(5)
    loader.set_epoch(5)
    assert resumed.state_dict() == {"epoch": 5, "samples": 0}
    assert labels(resumed) == labels(loader)


def test_measuring_on_the_first_batches_does_not_disturb_training():
    loader = DataModule(2, Numbers(10), num_workers=2).train_loader()
    training = iter(loader)
    measured = iter(loader)
    first = next(measured)["class_label"].tolist()
    del measured
    assert [batch["class_label"].tolist() for batch in training] == labels(loader)
    assert labels(loader)[0] == first


def test_validation_stream_is_the_same_every_time(tmp_path):
    write_tar(tmp_path / "a.tar", range(5))
    stream = Shards(tmp_path, 4, crop="random", resize="none")
    loader = DataModule(2, validation=stream, num_workers=2).validation_loader()
    runs = [{c: i for batch in loader for c, i in zip(batch["caption"], batch["image"], strict=True)} for _ in range(2)]
    assert len(runs[0]) == 5 and all(torch.equal(runs[0][c], runs[1][c]) for c in runs[0])


def test_workers_report_to_the_main_process(tmp_path, caplog):
    write_pictures(tmp_path, 4)
    (tmp_path / "a.png").write_bytes(b"broken")
    dataset = ImageFolder(tmp_path, 4)
    with caplog.at_level(logging.ERROR):
        assert len(list(DataModule(2, validation=dataset, num_workers=2).validation_loader())) == 2
    assert dataset.errors.num_unreadable == 1


def test_mistakes_met_by_a_worker_stay_one_line(tmp_path):
    write_tar(tmp_path / "a.tar", range(4))
    loader = DataModule(2, validation=Shards(tmp_path, 8, {"y": "json.absent"}), num_workers=1).validation_loader()
    with pytest.raises(UserError, match="json has no absent for 'y'") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)


def test_number_of_workers():
    module = DataModule(2, Numbers(8))
    assert module.train_loader().num_workers == 0
    assert 1 <= DataModule(2, Numbers(100)).train_loader().num_workers <= 8
    loader = DataModule(2, Numbers(8), num_workers=1).train_loader()
    assert loader.num_workers == 1 and loader.persistent_workers


def test_texts_for_a_tokenizer(tmp_path):
    assert list(DataModule(2, Numbers(3)).train_texts()) == ["number 0", "number 1", "number 2"]
    write_tar(tmp_path / "a.tar", range(2))
    assert list(DataModule(2, IndexedShards(tmp_path, 8)).train_texts()) == ["picture 0", "picture 1"]
    with pytest.raises(UserError, match="no text under 'class_label', they have image, caption, class_label"):
        next(DataModule(2, Numbers(3)).train_texts("class_label"))


def test_shapes_are_summed_up():
    assert DataModule(4, Numbers(10)).shape_summary() == [
        "train: Numbers, 10 items in batches of 4: image [1, 2, 2] in [0.00, 0.00], caption str, class_label int"
    ]


def write_classes(root, **folders):
    for kind, classes in folders.items():
        for name in classes:
            write_pictures(root / kind / name, 1)
    return [ImageFolder(root / kind, 4, class_folders=True) for kind in folders]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog"], None),
        (["dog"], "validation: lacks 'cat', compared with the 2 classes of the training set"),
        (["ant", "dog"], "lacks 'cat' and has 'ant' in addition"),
        (["ant", "bee", "cat", "dog"], "has 2 classes, first 'ant', in addition"),
    ],
)
def test_sets_that_number_their_classes_otherwise_are_refused(tmp_path, classes, message):
    train, other = write_classes(tmp_path, train=["cat", "dog"], other=classes)
    DataModule(1, train, ImageFolder(tmp_path / "other", 4))  # no labels, nothing to compare
    for make in (lambda: DataModule(1, train, other), lambda: DataModule(1, LowRes(train), LowRes(other))):
        if message is None:
            make()
        else:
            with pytest.raises(UserError, match=f"data.params.*{message}.*take both from one folder or table"):
                make()
    if message is not None:
        with pytest.raises(UserError, match="data.params.test: "):
            DataModule(1, train, test=other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataModule(0, Numbers(3)), "batch_size 0 must be positive"),
        (lambda: DataModule(2).train_loader(), "data.params.train: there is no training set"),
        (lambda: len(DataModule(4, Numbers(3)).train_loader()), "3 items do not fill one batch of 4 .* lower data"),
        (lambda: next(iter(DataModule(4, Numbers(3)).train_loader())), "raise `repeats`"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_evaluation_on_more_processes_than_items_is_refused_on_each():
    for rank in range(4):
        with (
            as_rank(rank, 4),
            pytest.raises(UserError, match="3 items .* 4 processes"),
        ):
            next(iter(DataModule(1, validation=Numbers(3)).validation_loader()))


class Own(Dataset):
    """A data set of one's own, whose items are all the same."""

    def __init__(self, item, count=4):
        self.item, self.count = item, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.item


class WithoutLength:
    def __getitem__(self, index):
        return {}


@pytest.mark.parametrize("item", [None, torch.zeros(3, 8, 8), (torch.zeros(3, 8, 8), 1), [1], "text", {1: 2}])
def test_items_of_ones_own_data_sets_have_to_be_dicts(item):
    with pytest.raises(UserError, match=f"Own: items must be dicts.*{type(item).__name__}"):
        _ = DataModule(2, Own(item)).first_items
    with pytest.raises(UserError, match="Own: items must be dicts"):
        list(DataModule(2, Own(item)).train_texts())


def test_a_training_set_has_a_length_and_items():
    with pytest.raises(UserError, match="WithoutLength: has no __len__"):
        _ = DataModule(2, WithoutLength()).first_items
    with pytest.raises(UserError, match="data.params.train: Own is empty"):
        DataModule(2, Own({}, 0)).train_loader()
