"""LPIPS: names, where weights come from without a network connection, what is differentiated, precision."""

import lpips
import pytest
import torch
from torch import nn

from ldm.errors import UserError
from ldm.networks.perceptual import CHANNELS, LPIPS, VGG16_FILE

STAGES = {"slice1": (0, 2), "slice2": (5, 7), "slice3": (10, 12, 14), "slice4": (17, 19, 21), "slice5": (24, 26, 28)}


@pytest.fixture(scope="module")
def vgg_state() -> dict[str, torch.Tensor]:
    """Give random weights in the layout of torchvision's VGG16, half-precision to keep the file small."""
    generator, state, channels = torch.Generator().manual_seed(7), {}, 3
    for width, indices in zip(CHANNELS, STAGES.values(), strict=True):
        for i in indices:
            weight = torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
            state |= {f"features.{i}.weight": weight.half(), f"features.{i}.bias": torch.zeros(width).half()}
            channels = width
    return state | {"classifier.6.bias": torch.zeros(10)}


@pytest.fixture(scope="module")
def vgg_file(vgg_state, tmp_path_factory) -> str:
    """Give these weights as a file."""
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save(vgg_state, path)
    return str(path)


@pytest.fixture(scope="module")
def metric(vgg_file) -> LPIPS:
    """Give the distance with the weights of that file."""
    return LPIPS(weights=vgg_file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Give the place of VGG16 in torch's cache, which is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "hub" / "checkpoints" / VGG16_FILE


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1


def test_names_are_the_published_ones():
    with torch.device("meta"):
        state = LPIPS().state_dict()
    expected = ["scaling_layer.shift", "scaling_layer.scale"]
    expected += [f"net.{s}.{i}.{p}" for s, ids in STAGES.items() for i in ids for p in ("weight", "bias")]
    expected += [f"lin{i}.model.1.weight" for i in range(5)]
    assert list(state) == expected
    assert all(value.is_meta for value in state.values())


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_distance_is_that_of_the_lpips_package(metric, images):
    expected = metric(*images)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    assert not theirs.load_state_dict(metric.state_dict(), strict=False).unexpected_keys
    torch.testing.assert_close(theirs(*images), expected)


def test_distance_is_the_published_formula(metric, vgg_state, images):
    distance = metric(*images)
    features = []
    for image in images:
        f, taps = (image - metric.scaling_layer.shift) / metric.scaling_layer.scale, []
        for stage, indices in enumerate(STAGES.values()):
            f = nn.functional.max_pool2d(f, 2) if stage else f
            for i in indices:
                f = nn.functional.conv2d(f, vgg_state[f"features.{i}.weight"].float(), padding=1).relu()
            taps.append(f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10))
        features.append(taps)
    weights = [metric.get_submodule(f"lin{i}").model[1].weight for i in range(5)]
    expected = sum(
        (w * (a - b) ** 2).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        for w, a, b in zip(weights, *features, strict=True)
    )
    assert expected.shape == (2, 1, 1, 1)
    torch.testing.assert_close(distance, expected)


def test_fitted_weights_come_with_the_package(metric, images):
    metric(*images)
    weight = metric.state_dict()["lin0.model.1.weight"]
    assert weight.any() and (weight >= 0).all()


def test_distance_is_a_symmetric_dissimilarity(metric, images):
    x, y = images
    assert not metric(x, x).any()
    assert (metric(x, y) > 0).all()
    torch.testing.assert_close(metric(x, y), metric(y, x))


def test_only_the_images_are_differentiated(metric, images):
    x, y = images[0].clone().requires_grad_(), images[1]
    metric(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert not any(p.requires_grad for p in metric.parameters())


def test_gradient_is_finite_where_all_features_are_zero(images):
    metric = LPIPS(random_features=True)
    with torch.no_grad():
        for p in metric.net.slice1.parameters():
            p.fill_(-1.0)  # no feature of the first stage survives its relu
        metric.net.slice2[1].weight.fill_(1.0)
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    metric(x, torch.ones_like(x)).sum().backward()
    assert x.grad.isfinite().all()


def test_training_mode_does_not_switch_dropout_on(metric, images):
    expected = metric.eval()(*images)
    parent = nn.Sequential(metric).train()
    assert parent.training and not any(module.training for module in metric.modules())
    assert torch.equal(metric(*images), expected)


def test_grey_images_and_many_channels(metric):
    x, y = torch.rand(2, 5, 16, 16), torch.rand(2, 5, 16, 16)
    single = torch.stack([metric(x[:, i : i + 1], y[:, i : i + 1]) for i in range(5)])
    torch.testing.assert_close(metric(x[:, :1].expand(-1, 3, -1, -1), y[:, :1].expand(-1, 3, -1, -1)), single[0])
    torch.testing.assert_close(metric(x, y), single.mean(dim=0))


def test_small_images_are_refused(metric):
    with pytest.raises(UserError, match="at least 16"):
        metric(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))


def test_autocast_does_not_reach_the_distance(metric, images):
    expected = metric(*images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = metric(*images)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert metric(images[0].bfloat16(), images[1].bfloat16()).dtype == torch.float32


def test_construction_reads_nothing_and_the_first_use_says_what_to_fetch(hub, images):
    metric = LPIPS()
    with pytest.raises(UserError) as error:
        metric(*images)
    assert str(hub) in str(error.value) and f"https://download.pytorch.org/models/{VGG16_FILE}" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_hub_cache_is_the_default_place(hub, vgg_state, metric, images):
    hub.parent.mkdir(parents=True)
    torch.save(vgg_state, hub)
    assert torch.equal(LPIPS()(*images), metric(*images))


def test_weights_from_a_checkpoint_need_no_file(hub, metric, images):
    expected = metric(*images)
    copy = nn.ModuleDict({"perceptual_loss": LPIPS()})
    copy.load_state_dict({f"perceptual_loss.{k}": v for k, v in metric.state_dict().items()})
    assert torch.equal(copy["perceptual_loss"](*images), expected)


def test_missing_or_foreign_files_are_named(tmp_path, images):
    missing, foreign = tmp_path / "missing.pth", tmp_path / "foreign.pth"
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, foreign)
    with pytest.raises(UserError, match=r"missing\.pth"):
        LPIPS(weights=str(missing))(*images)
    with pytest.raises(UserError, match=r"foreign\.pth .*VGG16"):
        LPIPS(weights=str(foreign))(*images)


def test_random_features_are_the_same_in_every_run(hub, images):
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(LPIPS(random_features=True)(*images))
    assert torch.equal(*values) and (values[0] > 0).all()
