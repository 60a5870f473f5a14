"""The order of streams: the same for any number of ranks and workers, resumed anywhere; evaluation exact."""

import logging
import math
import threading
from itertools import count

import pytest
import torch
from picture_files import write_tar
from ranks import as_rank

from ldm.data.core.module import DataModule
from ldm.data.shards.shards import Shards
from ldm.data.shards.streams import read_ahead
from ldm.errors import UserError

ALL = [f"picture {i}" for i in range(22)]
BAD = {2: {"png": b"no picture"}, 3: {"txt": b"\xff"}, 14: {"png": b""}}


def write_shards(folder, files=lambda i: {}, sizes=(6, 3, 7, 1, 5)):
    """Write shards of uneven sizes."""
    first = 0
    for number, size in enumerate(sizes):
        write_tar(folder / f"train-{number:04d}.tar", range(first, first + size), files)
        first += size
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


def stream(folder, **options):
    return Shards(folder, 4, crop="random", resize="none", flip=0.5, buffer=6, **options)


def batches(loader, epoch=0):
    loader.set_epoch(epoch)
    return [list(zip(batch["caption"], batch["image"].sum((1, 2, 3)).tolist(), strict=True)) for batch in loader]


def epoch_of(dataset, world=1, batch=12, num_workers=0, epoch=0, samples=0, **options):
    """Give the global batches of an epoch, in order of their positions; by default from its beginning."""
    shares = []
    for rank in range(world):
        with as_rank(rank, world):
            loader = DataModule(batch // world, dataset, num_workers=num_workers, seed=3, **options).train_loader()
            loader.load_state_dict({"epoch": epoch, "samples": samples})
            shares.append(batches(loader, epoch))
    assert len({len(share) for share in shares}) == 1
    return [[item for group in zip(*parts, strict=True) for item in group] for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("num_streams", [None, 3])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_endless_order_does_not_depend_on_ranks(shards, world, num_streams):
    dataset = stream(shards, samples_per_epoch=48, shuffle_streams=num_streams)
    alone = epoch_of(dataset, epoch=1)
    assert len(alone) == 4 and epoch_of(dataset, world, epoch=1) == alone
    assert epoch_of(dataset, epoch=2) != alone


@pytest.mark.parametrize("samples_per_epoch", [48, None])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_order_does_not_depend_on_workers(shards, num_workers, samples_per_epoch):
    dataset = stream(shards, samples_per_epoch=samples_per_epoch)
    assert epoch_of(dataset, num_workers=num_workers, batch=4) == epoch_of(dataset, batch=4)


@pytest.mark.parametrize("world", [2, 3])
def test_one_pass_is_shared_out_without_the_rest(shards, world):
    alone = epoch_of(stream(shards), batch=6)
    assert len(alone) == 3 and len({caption for batch in alone for caption, _ in batch}) == 18
    assert epoch_of(stream(shards), world, batch=6) == alone
    rest = epoch_of(stream(shards), world, batch=6, drop_last=False)
    assert rest[:3] == alone and len(rest) == 4 and len(rest[3]) == 22 // world * world - 18


@pytest.mark.parametrize(("samples_per_epoch", "num_streams"), [(2000, 4), (2000, 1)])
def test_uneven_shards_are_shown_equally_often(shards, samples_per_epoch, num_streams):
    dataset = Shards(shards, 4, samples_per_epoch=samples_per_epoch, shuffle_streams=num_streams)
    shown = [caption for batch in epoch_of(dataset, batch=50) for caption, _ in batch]
    times = [shown.count(caption) for caption in ALL]
    assert sum(times) == 2000 and 0.8 * 2000 / 22 < min(times) <= max(times) < 1.2 * 2000 / 22


def test_a_rank_opens_only_its_shards(shards, monkeypatch):
    monkeypatch.setenv("LDM_ALLOW", "pipe:")
    log, opened = shards / "opened", []
    dataset = stream([f"pipe:echo {i} >> {log}; cat {shards}/train-{i:04d}.tar" for i in range(5)], samples_per_epoch=4)
    for rank in range(4):
        with as_rank(rank, 4):
            list(DataModule(1, dataset, num_workers=0).train_loader())
        opened.append(set(log.read_text().split()[1:]))  # after the check before the start
        log.unlink()
    assert sum(len(part) for part in opened) == len(set.union(*opened)) <= 5  # each shard by one rank


def test_shared_streams_are_logged_once(shards, caplog):
    with as_rank(0, 3), caplog.at_level(logging.WARNING):
        loader = DataModule(1, stream(shards, samples_per_epoch=12), num_workers=0).train_loader()
        assert len(batches(loader)) == len(batches(loader, 1)) == 4
    told = [record.getMessage() for record in caplog.records if "read the same shards" in record.getMessage()]
    assert len(told) == 1 and "set shuffle_streams to a multiple of 3" in told[0]


@pytest.mark.parametrize(("before", "after"), [((1, 0), (1, 2)), ((1, 2), (2, 0)), ((2, 0), (1, 0)), ((4, 0), (2, 2))])
@pytest.mark.parametrize("samples_per_epoch", [48, None])
def test_another_number_of_ranks_and_workers_goes_on_in_mid_epoch(shards, before, after, samples_per_epoch):
    dataset = stream(shards, samples_per_epoch=samples_per_epoch)
    whole = epoch_of(dataset, batch=4, epoch=2)
    (world, num_workers), ahead = (
        before,
        int(samples_per_epoch is None),
    )  # Lightning asks for one where length is unknown
    with as_rank(world - 1, world):
        loader = DataModule(4 // world, dataset, num_workers=num_workers, seed=3).train_loader()
        loader.set_epoch(2)
        given = iter(loader)
        for _ in range(2 + ahead):
            next(given)
        state = loader.state_dict()
    assert state == {"epoch": 2, "samples": 8}
    world, num_workers = after
    assert epoch_of(dataset, world, 4, num_workers, **state) == whole[2:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_each_sample_exactly_once(shards, world, num_workers):
    seen = []
    for rank in range(world):
        with as_rank(rank, world):
            module = DataModule(4, validation=stream(shards, samples_per_epoch=8), num_workers=num_workers)
            loader = module.validation_loader()
            first = [item for batch in batches(loader) for item in batch]
            assert [item for batch in batches(loader, epoch=5) for item in batch] == first
        assert len(first) in (22 // world, math.ceil(22 / world))
        seen += first
    assert sorted(caption for caption, _ in seen) == sorted(ALL)
    with as_rank(0, 1):
        alone = DataModule(4, validation=stream(shards), num_workers=0).validation_loader()
        assert sorted(seen) == sorted(item for batch in batches(alone) for item in batch)


def test_evaluation_on_more_ranks_than_samples_is_refused_on_each(tmp_path):
    write_shards(tmp_path, sizes=(2, 1))
    for rank in range(4):
        with as_rank(rank, 4), pytest.raises(UserError, match="3 samples .* 4 processes"):
            next(iter(DataModule(1, validation=stream(tmp_path)).validation_loader()))


@pytest.mark.parametrize("samples_per_epoch", [48, None])
def test_unreadable_samples_are_replaced_in_the_same_way_on_any_number_of_ranks(tmp_path, samples_per_epoch):
    dataset = stream(write_shards(tmp_path, lambda i: BAD.get(i, {})), samples_per_epoch=samples_per_epoch)
    alone = epoch_of(dataset, batch=6, max_bad_fraction=None)
    assert all(len(batch) == 6 for batch in alone) and dataset.errors.num_unreadable >= 2
    assert not {caption for batch in alone for caption, _ in batch} & {f"picture {i}" for i in BAD}
    for world, num_workers in ((2, 0), (3, 0), (1, 2)):
        assert epoch_of(dataset, world, 6, num_workers, max_bad_fraction=None) == alone
    assert epoch_of(dataset, 2, 6, samples=6, max_bad_fraction=None) == alone[1:]


def test_unreadable_samples_are_left_out_of_evaluation(tmp_path):
    dataset = stream(write_shards(tmp_path, lambda i: BAD.get(i, {})))
    shown = [c for b in batches(DataModule(1, validation=dataset, num_workers=1).validation_loader()) for c, _ in b]
    assert shown == [caption for i, caption in enumerate(ALL) if i not in BAD]


def test_where_a_group_is_unreadable_a_neighbour_in_the_batch_is_shown(tmp_path):
    dataset = stream(write_shards(tmp_path, lambda i: {} if i in (1, 9) else {"png": b"bad"}), samples_per_epoch=44)
    shown = {c for b in epoch_of(dataset, batch=22, max_bad_fraction=None) for c, _ in b}
    assert shown == {"picture 1", "picture 9"}


def test_a_batch_without_anything_readable_ends_the_run(tmp_path):
    dataset = stream(write_shards(tmp_path, lambda i: {"png": b"bad"}), samples_per_epoch=44)
    with pytest.raises(UserError, match="no sample of the 5 shards can be read; .*0.*is no image of a known"):
        epoch_of(dataset, batch=4, max_bad_fraction=None)


@pytest.mark.parametrize("samples_per_epoch", [48, None])
def test_empty_shards_are_an_error_and_no_endless_loop(tmp_path, samples_per_epoch):
    write_shards(tmp_path, lambda i: {"png": None, "txt": None})
    with pytest.raises(UserError, match="can be read; the shards hold none of the files asked for"):
        epoch_of(stream(tmp_path, samples_per_epoch=samples_per_epoch))


def test_remote_shards_on_several_ranks_need_the_length_of_an_epoch(shards, monkeypatch):
    monkeypatch.setenv("LDM_ALLOW", "pipe:")
    dataset = Shards([f"pipe:cat {shards}/train-0000.tar"], 4)
    with as_rank(1, 2), pytest.raises(UserError, match="remote shards that 2 processes train on needs samples_per_ep"):
        next(iter(DataModule(1, dataset, num_workers=0).train_loader()))


def test_length_in_batches(shards):
    assert len(DataModule(5, stream(shards, samples_per_epoch=48)).train_loader()) == 9
    with as_rank(0, 4):
        assert len(DataModule(5, stream(shards, samples_per_epoch=48)).train_loader()) == 2
        assert len(DataModule(50, stream(shards, samples_per_epoch=48)).train_loader()) == 1
    with pytest.raises(TypeError, match="not known"):
        len(DataModule(2, stream(shards)).train_loader())


def test_reading_ahead_stops_with_its_reader_and_passes_errors_on():
    taken = []
    values = read_ahead((taken.append(i) or i for i in count()), 4)
    assert [next(values) for _ in range(6)] == list(range(6))
    values.close()
    assert len(taken) <= 12 and not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
    failing = read_ahead((1 // (3 - i) for i in range(9)), 1)
    assert [next(failing) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(failing)


def test_an_abandoned_iteration_leaves_the_next_one_untouched(shards):
    loader = DataModule(4, stream(shards, samples_per_epoch=48), num_workers=2).train_loader()
    whole = batches(loader)
    first = next(iter(loader))
    assert first["caption"] == [caption for caption, _ in whole[0]] and batches(loader) == whole
    assert torch.isfinite(first["image"]).all()
