"""Extractors: the shipped one sees content and faults; those of others say what they need."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from ldm.data.core.loader import collate
from ldm.data.core.pixels import to_bytes
from ldm.errors import UserError
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.distribution_metrics import Frechet
from ldm.evaluation.distributions import ReferenceStatistics
from ldm.evaluation.evaluate import label
from ldm.evaluation.extractors import Clip, Dino, Inception
from ldm.evaluation.references import ReferenceSet
from ldm.toy import scene_network
from ldm.toy.scene_extractor import SCENE_WEIGHTS, SceneNet
from ldm.toy.shapes import Shapes


def scenes(count, **options):
    dataset = Shapes(count, 32, **options)
    return collate([dataset[i] for i in range(count)])


def test_the_shipped_weights_are_small_and_know_the_things_of_unseen_scenes():
    assert SCENE_WEIGHTS.stat().st_size < 1.5e6
    batch = scenes(200, split="validation")
    seen = SceneNet()(to_bytes(batch["image"]))
    assert seen.pooled.shape == (200, 64) and seen.spatial.shape == (200, 384)
    known = (batch["box_labels"] == seen.logits.argmax(1)[:, None]).any(1)
    assert known.float().mean() > 0.97


@pytest.fixture(scope="module")
def reference():
    return ReferenceStatistics.of(SceneNet()(to_bytes(scenes(200, seed=1)["image"])))


@pytest.fixture(scope="module")
def others():
    """Give images of other scenes, (B, C, H, W)."""
    return scenes(200, seed=2)["image"]


@pytest.mark.parametrize("defect", scene_network.DEFECTS, ids=lambda defect: defect.__name__)
def test_the_distance_grows_with_a_defect(defect, reference, others):
    pytest.importorskip("torch_fidelity")
    torch.manual_seed(0)
    faulty = defect(others, torch.randn_like(others))
    mixed = [torch.lerp(others, faulty, share).clamp(-1, 1) for share in (0.0, 0.5, 1.0)]
    distances = [Frechet()(SceneNet()(to_bytes(images)), reference)["frechet"] for images in mixed]
    assert distances[0] < distances[1] < distances[2]


def test_training_lowers_the_loss_and_repeats_itself():
    runs = [list(scene_network.train_scene_network(12, 100)[1]) for _ in range(2)]
    assert runs[0] == runs[1] and sum(runs[0][-4:]) < sum(runs[0][:4])


def test_other_sizes_are_resized_grey_is_shown_and_other_channels_refused():
    images = to_bytes(scenes(4)["image"])
    large = F.interpolate(images, scale_factor=3)
    torch.testing.assert_close(SceneNet()(large).pooled, SceneNet()(images).pooled, atol=0.6, rtol=0.1)
    assert SceneNet()(images[:, :1]).pooled.shape == (4, 64)
    with pytest.raises(UserError, match="scenenet: images of 5 channels"):
        SceneNet()(torch.zeros(1, 5, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="needs images uint8"):
        SceneNet()(torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Write random weights in torch-fidelity's layout: those that are published cannot be fetched by a test."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = kind("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_has_pooled_logits_and_places_and_its_name_only_with_the_published_weights(inception_file):
    extractor = Inception(inception_file)
    seen = extractor(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert [tuple(part.shape) for part in seen] == [(2, 2048), (2, 1008), (2, 7 * 17 * 17)]
    assert extractor.name.startswith("inception-") and len(extractor.hash) == 64


def test_absent_weights_say_what_to_fetch_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError, match=r"inception: no weights at .*nowhere.pth; fetch https://"):
        _ = Inception(tmp_path / "nowhere.pth").hash
    with pytest.raises(UserError, match="scenenet: no weights at .*train_scene_network"):
        _ = SceneNet(tmp_path / "none.safetensors").hash
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for extractor in (Clip(version="no/such-clip"), Dino(version="no/such-dino")):
        with pytest.raises(UserError, match="is not on this machine"):
            extractor(image)
    with pytest.raises(UserError, match="size 'x' is not one of s, b, l, g"):
        Dino("x")


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_weights_that_do_more_than_hold_tensors_are_refused(tmp_path, capsys):
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="weights.pth: is not a checkpoint"):
        _ = Inception(path).hash
    assert not capsys.readouterr().out


def test_mmd_of_a_clip_folder_is_cmmd(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=8)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    suite = make_metric_suite(["mmd"], f"clip:version={tmp_path / 'clip'}", torch.device("cpu"), keep=0)
    ours, theirs = (suite.extractor(to_bytes(scenes(6, seed=seed)["image"])) for seed in (1, 2))
    torch.testing.assert_close(ours.pooled.norm(dim=1), torch.ones(6))
    x, y = ours.pooled.double(), theirs.pooled.double()
    means = [torch.exp((a @ b.T - 1) / 100).mean() for a, b in ((x, x), (y, y), (x, y))]  # |a - b|^2 is 2 - 2 a.b
    expected = 1000 * (means[0] + means[1] - 2 * means[2]).item()
    values = suite.compare_sets(ours, ReferenceSet(ReferenceStatistics.of(theirs), {}))
    assert values == {"mmd[clip]": pytest.approx(expected, rel=1e-4)} and label(*values, 6) == "CMMD of 6 samples"
