import pytest
import torch
from picture_files import write_pictures

from ldm.data.core.module import DataModule
from ldm.data.image_pairs.inpainting import Masked
from ldm.data.image_pairs.super_resolution import LowRes
from ldm.data.readers.captions import CaptionedFolder
from ldm.data.readers.folders import ImageFolder
from ldm.toy.shapes import Shapes


def epochs_of(dataset, key):
    loader = DataModule(2, train=dataset, num_workers=0, shuffle=False).train_loader()
    seen = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        seen.append(torch.cat([batch[key] for batch in loader]))
    return seen


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: LowRes(data, 2)], ids=["", "twice"])
def test_what_is_derived_changes_from_epoch_to_epoch_and_comes_again(wrap):
    first, second, again = epochs_of(Masked(wrap(Shapes(4, 16))), "mask")
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_crops_below_a_wrapper_change_as_well(tmp_path):
    write_pictures(tmp_path)
    dataset = LowRes(Masked(ImageFolder(tmp_path, 8, crop="random", resize="none")), 2)
    first, second, again = epochs_of(dataset, "image")
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_validation_draws_the_same_holes_every_time():
    loader = DataModule(2, validation=Masked(Shapes(4, 16)), num_workers=0).validation_loader()
    first, second = (torch.cat([batch["mask"] for batch in loader]) for _ in range(2))
    assert torch.equal(first, second)


def test_texts_are_listed_through_wrappers(tmp_path):
    for i, name in enumerate(write_pictures(tmp_path)):
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {i}")
    dataset = LowRes(Masked(CaptionedFolder(tmp_path, 8)))
    assert list(DataModule(2, train=dataset).train_texts()) == [f"caption {i}" for i in range(4)]
    assert dataset.source is dataset.dataset.dataset
