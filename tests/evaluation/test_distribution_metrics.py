"""Figures of features: torch-fidelity's own API on the same pictures, closed forms, and too little to measure."""

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.distribution_metrics import (
    DISTRIBUTION_METRICS,
    Frechet,
    InceptionScore,
    Kernel,
    Moments,
    PrecisionRecall,
    ReferenceStatistics,
    SpatialFrechet,
    frechet_distance,
    moments,
)
from ldm.evaluation.extractors import Features
from ldm.toy.scene_extractor import SceneNet

fidelity = pytest.importorskip("torch_fidelity")
KINDS = {"fid": Frechet(), "kid": Kernel(5, 20), "isc": InceptionScore(4), "prc": PrecisionRecall()}
PAIRS = {
    "frechet_inception_distance": "frechet",
    "kernel_inception_distance_mean": "kernel",
    "kernel_inception_distance_std": "kernel_std",
    "inception_score_mean": "inception_score",
    "inception_score_std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}


class Registered(fidelity.FeatureExtractorBase):
    """Give our features to torch-fidelity."""

    def __init__(self, name, features_list, **options):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pooled", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        seen = SceneNet()(images)
        return tuple({"pooled": seen.pooled, "logits": seen.logits}[name] for name in self.features_list)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
        self.images[:, :, : 8 * (seed + 1)] //= 2

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_figures_are_those_of_the_api_of_torch_fidelity():
    fidelity.register_feature_extractor("ours", Registered)
    first, second = Pictures(0), Pictures(1)
    theirs = fidelity.calculate_metrics(
        input1=first, input2=second, feature_extractor="ours", cuda=False, cache=False, verbose=False, batch_size=40,
        kid_subsets=5, kid_subset_size=20, isc_splits=4, **dict.fromkeys(KINDS, True),
    )  # fmt: skip
    reference = ReferenceStatistics.of(SceneNet()(second.images))
    features = SceneNet()(first.images)
    ours = {name: value for metric in KINDS.values() for name, value in metric(features, reference).items()}
    for name, our_name in PAIRS.items():
        assert ours[our_name] == pytest.approx(theirs[name], abs=1e-6), name


def test_gaussians_have_the_closed_form():
    mean, deviation = np.array([1.0, -2.0], np.float32), np.diag([2.0, 0.5])
    other = Moments(np.zeros(2, np.float32), np.eye(2))
    expected = 5 + (2**0.5 - 1) ** 2 + (0.5**0.5 - 1) ** 2
    assert frechet_distance(Moments(mean, deviation), other) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself():
    features = SceneNet()(Pictures(0).images)
    reference = ReferenceStatistics.of(features)
    assert abs(Frechet()(features, reference)["frechet"]) < 1e-3
    assert abs(SpatialFrechet()(features, reference)["spatial_frechet"]) < 1e-3
    assert PrecisionRecall()(features, reference) == {"precision": 1.0, "recall": 1.0}


def test_each_metric_says_how_many_it_needs():
    assert {name: metric().minimum for name, metric in DISTRIBUTION_METRICS.items()} == {
        "frechet": 2, "spatial_frechet": 2, "kernel": 1000, "inception_score": 10, "precision_recall": 4
    }  # fmt: skip
    assert Kernel(size=30).minimum == 30


def test_what_an_extractor_or_a_reference_lacks_is_named():
    bare = Features(torch.randn(12, 3))
    reference = ReferenceStatistics.of(bare)
    with pytest.raises(UserError, match="spatial_frechet: .* no spatial"):
        SpatialFrechet()(bare, reference)
    with pytest.raises(UserError, match="inception_score: .* no logits"):
        InceptionScore()(bare, None)
    imported = ReferenceStatistics(None, moments(bare.pooled))
    with pytest.raises(UserError, match="precision_recall: needs the features of the reference"):
        PrecisionRecall()(bare, imported)
    with pytest.raises(UserError, match="features of 3 and 2 numbers"):
        frechet_distance(reference.pooled, Moments(np.zeros(2, np.float32), np.eye(2)))
