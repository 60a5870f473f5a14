"""What of the data does not go with a model is told in one line, and what does go is not."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from tiny import autoencoder, autoencoder_training, latent_diffusion, unet
from torch import nn

from ldm.conditioning.images import FirstStageConditioner, ImageConditioner, SpatialRescaler
from ldm.conditioning.labels import ClassConditioner
from ldm.conditioning.layout import LayoutConditioner
from ldm.data.core.module import DataModule
from ldm.data.layout.boxes import BoxTokenizer
from ldm.doctor.data_fit import check_data_fits_model, fit_problems, missing_keys
from ldm.doctor.summary import Summary
from ldm.errors import UserError
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.networks.unet import UNet


def summed(*items: dict[str, Any]) -> Summary:
    summary = Summary()
    for item in items:
        summary.add(item)
    return summary


def image(channels: int = 3, height: int = 8, width: int = 8) -> dict[str, Any]:
    return {"image": torch.zeros(channels, height, width)}


def network(channels: int, extra: int = 0) -> UNet:
    return unet(channels, extra, channel_mult=(1, 1))


def models() -> dict[str, tuple[nn.Module, int]]:
    return {
        "first stage": (autoencoder_training(), 2),
        "latents": (latent_diffusion(network(2), autoencoder()), 4),
        "pixels": (latent_diffusion(network(3), IdentityAutoencoder()), 2),
    }


@pytest.mark.parametrize("name", ["first stage", "latents", "pixels"])
def test_sizes_and_channels_of_pictures(name: str) -> None:
    model, multiple = models()[name]
    assert model.model.side_multiple == multiple
    assert fit_problems(model, summed(image())) == []
    odd, even = 8 + multiple // 2, 8
    (problem,) = fit_problems(model, summed(image(3, odd, even)))
    assert f"size {odd}x{even} does not go" in problem and f"sides that {multiple} divides" in problem
    (problem,) = fit_problems(model, summed(image(1)))
    assert problem == "image: has 1 channels, the autoencoder takes 3; set channels: 3, or in_channels"


def test_batches_that_are_resized_may_have_any_size() -> None:
    model = autoencoder_training(resize_range=(16, 32))
    assert fit_problems(model, summed(image(3, 9, 9))) == []


def test_what_is_not_there_is_not_compared() -> None:
    for model, _ in models().values():
        assert fit_problems(model, summed({"moments": torch.zeros(4, 4, 4)})) == fit_problems(model, summed({})) == []


def labels(*values: int) -> Summary:
    return summed(*({"class_label": value} for value in values))


@pytest.mark.parametrize(
    ("summary", "names", "message"),
    [
        (labels(0, 2), "", ""),
        (labels(0, 4), "", "class_label: has the class 4, but ClassConditioner takes 0 to 3; raise its num_classes"),
        (labels(0), "abcde", "class_label: has the class 4"),
        (labels(0, 3), "", "class_label: 3 is a class of the data, but means 'no class' to ClassConditioner"),
        (labels(0), "abcd", "class_label: 3 is a class of the data"),
        (labels(0), "abc", ""),
    ],
)
def test_class_labels(summary: Summary, names: str, message: str) -> None:
    found = fit_problems(ClassConditioner(4, 8, null_label=3), summary, list(names))
    assert bool(found) == bool(message) and "".join(found[:1]).startswith(message)


@pytest.mark.parametrize("part", [SpatialRescaler("map", in_channels=3), ImageConditioner("map", 3)])
def test_maps_and_images_of_a_condition(part: nn.Module) -> None:
    for value in (torch.tensor([[-1, 2]]), torch.zeros(3, 2, 2)):
        assert fit_problems(part, summed({"map": value})) == []
    name = type(part).__name__
    (problem,) = fit_problems(part, summed({"map": torch.tensor([[0, 1]])}, {"map": torch.tensor([[-1, 3]])}))
    assert problem == f"map: has the class 3, but {name} takes 0 to 2; raise its in_channels"
    assert fit_problems(part, summed({"map": torch.zeros(1, 2, 2)})) == [f"map: has 1 channels, but {name} takes 3"]


def test_images_for_the_first_stage() -> None:
    part = FirstStageConditioner("masked_image", mask_key="mask")
    model = latent_diffusion(network(2, 3), autoencoder(), part)
    item = {**image(), "masked_image": torch.zeros(3, 8, 8), "mask": torch.zeros(1, 8, 8)}
    assert fit_problems(model, summed(item)) == []
    wrong = {**item, "masked_image": torch.zeros(1, 8, 8)}
    assert fit_problems(model, summed(wrong)) == ["masked_image: has 1 channels, but FirstStageConditioner takes 3"]


def test_labels_of_boxes() -> None:
    tokenizer = BoxTokenizer(num_classes=3, max_objects=2, vocab_size=64, use_group=True)
    part = LayoutConditioner(tokenizer, 16, 1)
    assert fit_problems(part, summed({"box_labels": torch.tensor([5, -1])}), list("abc")) == []
    (problem,) = fit_problems(part, summed({"box_labels": torch.tensor([6, -1])}))
    assert problem.startswith("box_labels: has the class 6, but LayoutConditioner takes 0 to 5")


def test_keys_that_conditioners_read() -> None:
    part = FirstStageConditioner("masked_image", mask_key="mask")
    tokenizer = BoxTokenizer(num_classes=3, max_objects=2, vocab_size=64)
    found = missing_keys(nn.ModuleList([part, LayoutConditioner(tokenizer, 16, 1)]), ["image", "mask", "boxes"])
    assert found == [
        "FirstStageConditioner reads 'masked_image', items have image, mask, boxes",
        "LayoutConditioner reads 'box_labels', items have image, mask, boxes",
    ]


def test_the_first_item_of_each_set_is_looked_at_once() -> None:
    class Items(list):
        def __getitem__(self, index: int) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    asked: list[int] = []
    data = DataModule(1, Items([image()]), Items([image(3, 9, 8)]))
    with pytest.raises(UserError, match="data.params.validation: image: .*9x8 .* 2 .* size"):
        check_data_fits_model(models()["first stage"][0], data)
    assert data.shape_summary()[1].endswith("image [3, 9, 8] in [0.00, 0.00]") and asked == [0, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "image: is uint8"),
        (np.zeros((3, 8, 8), np.int64), "image: is int64"),
        (np.zeros((8, 8, 3), np.float32), r"image: items must be \(C, H, W\); this is \(H, W, C\), \[8, 8, 3\]"),
        (torch.zeros(8, 8, 1), r"\(H, W, C\)"),
        (torch.zeros(8, 8), r"must be \(C, H, W\); this is \[8, 8\]"),
        (np.zeros((3, 8, 8)), ""),
        (torch.zeros(3, 8, 8, dtype=torch.float16), ""),
    ],
)
def test_images_of_ones_own_data_sets(value: Any, message: str) -> None:
    for model, _ in models().values():
        problems = fit_problems(model, summed({"image": value}))
        assert len(problems) == bool(message) and all(re.search(message, problem) for problem in problems)
    rescaler = SpatialRescaler("image", in_channels=3, out_channels=3)
    problems = fit_problems(nn.ModuleList([rescaler]), summed({"image": value}))
    assert len(problems) == bool(message) and all(re.search(message, problem) for problem in problems)


def test_the_images_are_missed_like_the_conditions() -> None:
    model = models()["latents"][0]
    (problem,) = missing_keys(model, ["jpg", "txt"])
    assert "LatentDiffusion reads 'image', items have jpg, txt" in problem
    assert missing_keys(model, ["moments"]) == missing_keys(model, ["image"]) == []
    with pytest.raises(UserError, match="data.params.train: Autoencoder reads 'image', items have jpg"):
        check_data_fits_model(models()["first stage"][0], DataModule(1, [{"jpg": torch.zeros(3, 8, 8)}]))
