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
    MemorisationFrechet,
    Mmd,
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
        "frechet": 2, "spatial_frechet": 2, "memorisation_frechet": 2, "kernel": 1000, "mmd": 2, "inception_score": 10,
        "precision_recall": 4,
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


# --------------------------------------------------------------------------------------------------------- MMD, MIFID


def normal(count, seed, width=8, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def mmd(x, y, sigma=10.0):
    return Mmd(sigma)(Features(x), ReferenceStatistics.of(Features(y)))["mmd"]


def mifid(x, y, threshold=0.1):
    return MemorisationFrechet(threshold)(Features(x), ReferenceStatistics.of(Features(y)))["memorisation_frechet"]


def test_mmd_is_the_sum_over_all_pairs():
    x, y = normal(270, 0).numpy().astype(float), normal(5, 1, shift=0.5).numpy().astype(float)  # more than a chunk

    def mean(first, second):
        return np.mean([np.exp(-((a - second) ** 2).sum(1) / 200) for a in first])

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert mmd(torch.tensor(x).float(), torch.tensor(y).float()) == pytest.approx(expected, rel=1e-5)


def test_mmd_of_gaussians_has_the_closed_form():
    """For isotropic Gaussians E k = (s^2 / v)^(d/2) exp(-|m1 - m2|^2 / 2v), v the sum of s^2 and both variances."""
    count, width, sigma = 2000, 2, 1.5

    def mean(distance, first, second):
        v = sigma**2 + first + second
        return (sigma**2 / v) ** (width / 2) * np.exp(-(distance**2) * width / (2 * v))

    same, other, across = mean(0, 1, 1), mean(0, 0.25, 0.25), mean(1, 1, 0.25)
    with_itself = (2 - same - other) / count  # the estimate counts pairs of a sample and itself
    x, y = normal(count, 0, width), normal(count, 1, width, shift=1, scale=0.5)
    assert mmd(x, y, sigma) == pytest.approx(1000 * (same + other - 2 * across + with_itself), rel=0.1)


def test_mmd_knows_no_order_no_place_and_no_direction_and_has_bounds():
    x, y = normal(30, 0), normal(40, 1, shift=0.5)
    value, turn = mmd(x, y), torch.linalg.qr(normal(8, 2)).Q
    for first, second in ((x.flip(0), y), (y, x), (x + 3, y + 3), (x @ turn, y @ turn)):
        assert mmd(first, second) == pytest.approx(value, rel=1e-4)
    assert mmd(x, x.flip(0)) == pytest.approx(0, abs=1e-9)
    assert mmd(x, y) < mmd(x, y + 1) < mmd(x, y + 2)
    assert mmd(torch.zeros(2, 8), torch.full((2, 8), 1e3)) == pytest.approx(2000)


@pytest.mark.slow  # torchmetrics takes long to import
def test_mifid_is_that_of_torchmetrics_with_its_sets_the_other_way_round():
    """Kaggle averages over the samples, as we do; torchmetrics over the real images."""
    module = pytest.importorskip("torchmetrics.image.mifid")

    class Given(torch.nn.Module):
        num_features = 8

        def forward(self, features):
            return features

    for x, y in ((normal(60, 0, shift=1), normal(80, 1, shift=2)), (normal(60, 0, shift=9), normal(80, 1, shift=8))):
        theirs = module.MemorizationInformedFrechetInceptionDistance(feature=Given())
        theirs.update(x, real=True)
        theirs.update(y, real=False)
        assert mifid(x, y) == pytest.approx(theirs.compute().item(), rel=1e-3)


def test_mifid_is_the_frechet_distance_over_the_distance_to_the_nearest_training_image():
    x, y = normal(50, 0, shift=1), normal(70, 1, shift=1)

    def cosine(a, b):
        return abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))

    distance = np.mean([min(1 - cosine(a, b) for b in y.numpy()) for a in x.numpy()])
    frechet = Frechet()(Features(x), ReferenceStatistics.of(Features(y)))["frechet"]
    assert 0.1 < distance < 1 and mifid(x, y) == pytest.approx(frechet)  # far enough: nothing is divided
    assert mifid(x, y, threshold=1.0) == pytest.approx(frechet / distance, rel=1e-4)
    assert mifid(x, torch.cat([y, 2 * y[:1]]), 1.0) != pytest.approx(frechet)
    assert mifid(3 * x, 3 * y, 1.0) == pytest.approx(9 * frechet / distance, rel=1e-4)  # angles have no scale
    copies = y[:50] + normal(50, 2, scale=1e-3)
    assert mifid(copies, y) > 1000 * Frechet()(Features(copies), ReferenceStatistics.of(Features(y)))["frechet"]


def test_metrics_of_features_need_those_of_the_reference():
    bare = Features(torch.randn(12, 3))
    for metric in (Mmd(), MemorisationFrechet()):
        with pytest.raises(UserError, match=f"{metric.name}: needs the features of the reference"):
            metric(bare, ReferenceStatistics(None, moments(bare.pooled)))
