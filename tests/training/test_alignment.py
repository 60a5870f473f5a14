"""Alignment of hidden states with a teacher: the paper's term, what it changes and for how long, and its teachers."""

import hashlib
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from fitting import Noise, fit, fit_whole_and_in_two, largest_difference, loader
from torch import Tensor

from ldm.data.core.loader import collate
from ldm.doctor.data_fit import size_problems
from ldm.errors import UserError
from ldm.evaluation.extractors import Clip, Dino
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.networks.dit import DiT
from ldm.toy.scene_extractor import SceneNet
from ldm.training.alignment import Alignment
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.weights import files as storage
from ldm.weights.load import load_into

WIDTH = 5


class Means:
    """A teacher of one's own: random mixtures of the mean colours of patches, on any grid unless it has one."""

    name, width = "means", WIDTH

    def __init__(self, grid: tuple[int, int] | None = None, seed: int = 0) -> None:
        self.grid = grid
        self.mixture = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(seed))

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.mixture.numpy().tobytes()).hexdigest()

    def to(self, device: torch.device) -> "Means":
        return self

    def patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.einsum("dc,bchw->bdhw", self.mixture, F.adaptive_avg_pool2d(images, self.grid or grid))


def dit(alignment: Alignment | None = None, **options) -> DiffusionTraining:
    """Return the training of a transformer of 3 blocks and 4x4 patches on pixels; no layer is zero."""
    torch.manual_seed(0)
    network = DiT(3, 3, 8, 2, 32, 3, num_heads=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tiny.latent_diffusion(network, IdentityAutoencoder(), alignment=alignment, **options)


def unet(alignment: Alignment | None = None) -> DiffusionTraining:
    """Return the training of a U-Net on pixels, whose states have 8x8 places."""
    torch.manual_seed(0)
    return tiny.latent_diffusion(tiny.unet(3), IdentityAutoencoder(), alignment=alignment)


def test_the_term_is_that_of_the_paper():
    """As REPA's code has it: both sides normalised, negative products, means over patches and samples."""
    term = Alignment(Means(), depth=2, hidden_size=16).bind(dit().model.model.diffusion_model)
    states = torch.randn(3, 4, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    found = term(list(states), images)
    features, total = Means().patches(images, (4, 4)), 0.0
    for sample in range(4):
        for row in range(4):
            for column in range(4):
                h = term.projector(states[1, sample, :, row, column])
                y = features[sample, :, row, column]
                total -= (h @ y / (h.norm() * y.norm())).item() / 64
    assert found.item() == pytest.approx(total, abs=1e-6)
    kinds = [type(layer).__name__ for layer in term.projector]
    assert kinds == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]  # three layers, as published


def gradients(training: DiffusionTraining, only_the_term: bool = True) -> dict[str, Tensor]:
    """Return the gradients of a step, with the loss of the objective or without."""
    batch = next(iter(loader()))
    if only_the_term:
        training.objective.simple_weight = 0.0
    training.training_step(batch, 0).backward()
    return {name: value.grad for name, value in training.named_parameters() if value.grad is not None}


def test_the_gradient_reaches_the_blocks_before_the_state_and_ends_with_until(monkeypatch):
    reached = {name for name, grad in gradients(dit(Alignment(Means(), 2))).items() if grad.any()}
    assert any("blocks.1." in name for name in reached) and any("projector.0" in name for name in reached)
    assert not any("blocks.2." in name or "final_layer" in name for name in reached)
    aligned, plain = dit(Alignment(Means(), 2, until=7)), dit()
    monkeypatch.setattr(DiffusionTraining, "global_step", 7)
    later, usual = gradients(aligned, only_the_term=False), gradients(plain, only_the_term=False)
    for name, grad in usual.items():
        assert torch.equal(later.pop(name), grad)
    assert later and all(grad is not None and not grad.any() for grad in later.values())  # the perceptron rests


def test_the_loss_has_the_term_with_its_weight_and_the_log_both():
    batch = next(iter(loader()))
    training = dit(Alignment(Means(), 2, weight=0.25))
    plain, loss = dit().training_step(batch, 0), training.training_step(batch, 0)
    logs = training._train_means.take()
    assert loss.item() == pytest.approx(plain.item() + 0.25 * logs["loss_alignment"].item(), abs=1e-6)
    assert logs["loss"].item() == pytest.approx(loss.item()) and -1 <= logs["loss_alignment"] <= 1


def test_training_aligns_with_the_network_that_ships(tmp_path):
    training = unet(Alignment(SceneNet(), 2, weight=1.0, hidden_size=32))
    training.learning_rate = 3e-3
    images = collate([Noise()[i] for i in range(8)])
    terms = []
    for steps in (0, 12):
        if steps:
            fit(training, tmp_path, steps, batch_size=4)
        training._train_means.take()
        training.training_step(images, 0)
        terms.append(training._train_means.take()["loss_alignment"].item())
    assert terms[1] < terms[0] - 0.3


def test_the_perceptron_is_saved_goes_on_to_the_bit_and_is_no_part_of_the_model(tmp_path: Path):
    whole, first, second = (dit(Alignment(Means(), 2, until=3, hidden_size=16)) for _ in range(3))
    goes_on = fit_whole_and_in_two(whole, first, second, tmp_path)
    assert largest_difference(whole.state_dict(), second.state_dict()) == 0.0
    saved = storage.load(tmp_path / "last.ckpt")
    assert {"alignment.projector.0.weight", "alignment.projector.4.bias"} <= set(saved["state_dict"])
    assert saved["teachers"] == {"alignment": Means().hash}
    report = load_into(dit().model, saved["state_dict"])
    assert report.fits and set(report.tolerated) >= {"alignment.projector.0.weight"}
    report = load_into(dit(Alignment(Means(), 2, hidden_size=16)), dit().state_dict())  # begins anew
    assert report.fits
    with pytest.raises(UserError, match=r"training\.params\.alignment.*other weights"):
        other = dit(Alignment(Means(seed=1), 2, until=3, hidden_size=16))
        fit(other, tmp_path, 4, **goes_on)


def test_a_grid_that_does_not_match_is_one_line_with_both_and_may_be_resampled():
    training = dit(Alignment(Means((3, 6)), 2))
    line = r"state behind block 2 has 4x4 patches, the teacher means 3x6; choose another depth or size, or .*resample"
    (problem,) = size_problems(training, 8, 8)
    with pytest.raises(UserError, match=line) as caught:
        training.training_step(next(iter(loader())), 0)
    assert str(caught.value) == problem and len(problem) <= 300
    resampled = dit(Alignment(Means((3, 6)), 2, resample=True))
    assert not list(size_problems(resampled, 8, 8)) and resampled.training_step(next(iter(loader())), 0).isfinite()
    assert not list(size_problems(unet(Alignment(SceneNet(), 2)), 8, 8))


def test_what_cannot_be_aligned_is_refused():
    with pytest.raises(UserError, match="depth is 4, but DiT has 3 blocks; use 1 to 3"):
        dit(Alignment(Means(), 4))
    with pytest.raises(UserError, match="Linear shows no hidden states"):
        Alignment(Means(), 1).bind(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="batch has no images"):
        dit(Alignment(Means(), 1)).training_step({"moments": torch.zeros(2, 3, 8, 8)}, 0)


# ----------------------------------------------------------------------------------------------------------- teachers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Save tiny random networks of both kinds, as they are published."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("teachers")
    sizes = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=1)).save_pretrained(root / "dino")
    registers = transformers.Dinov2WithRegistersConfig(**sizes, mlp_ratio=1, num_register_tokens=2)
    transformers.Dinov2WithRegistersModel(registers).save_pretrained(root / "registers")
    clip = transformers.CLIPVisionConfig(**sizes | {"hidden_size": 16, "intermediate_size": 16, "projection_dim": 8})
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip")
    return root


def test_teachers_of_folders_have_features_of_places(folders: Path):
    images = torch.rand(2, 3, 20, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = images.clone()
    changed[0, :, :6, :6] = 1.0
    for teacher in (Dino("s", str(folders / "dino")), Clip(str(folders / "clip"), width=16)):
        features, other = (teacher.patches(x, (3, 6)) for x in (images, changed))
        assert features.shape == (2, teacher.width, 3, 6) and not features.requires_grad
        distance = (features - other)[0].norm(dim=0)
        assert distance.argmax() == 0 and torch.equal(features[1], other[1])  # the first place, of the first image
        assert teacher.patches(images[:, :1], (2, 2)).shape == (2, teacher.width, 2, 2)  # grey
    features = Dino("s", str(folders / "dino")).patches(images, (2, 2))
    x = F.interpolate(images, (28, 28), mode="bicubic")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    network = Dino("s", str(folders / "dino")).network
    with torch.no_grad():
        tokens = network(pixel_values=((x + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)


def test_absent_or_other_teachers_are_one_line(folders: Path, tmp_path: Path):
    image = torch.zeros(1, 3, 8, 8)
    for teacher, hub in ((Dino("s", str(tmp_path / "no")), "dinov2-small"), (Clip(str(tmp_path / "no")), "clip-vit")):
        with pytest.raises(UserError, match=f"is not on this machine: run `hf download .*{hub}.* --local-dir .*/no`"):
            teacher.patches(image, (2, 2))
    with pytest.raises(UserError, match="dinov2-b: its features have 384 channels, not 768"):
        Dino("b", str(folders / "dino")).patches(image, (2, 2))
    with pytest.raises(UserError, match="has registers"):
        Dino("s", str(folders / "registers")).patches(image, (2, 2))
    with pytest.raises(UserError, match="images of 5 channels"):
        SceneNet().patches(torch.zeros(1, 5, 32, 32), (8, 8))


def test_a_missing_teacher_ends_a_training_before_its_first_step(tmp_path: Path):
    training = dit(Alignment(Dino("s", str(tmp_path / "no")), 2))
    with pytest.raises(UserError, match="hf download facebook/dinov2-small"):
        fit(training, tmp_path, 2)
    assert training.seen == 0
