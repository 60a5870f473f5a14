"""What is measured of a first stage is what its own methods give, and a page shows it beside released ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from picture_files import write_pictures
from tiny import CHANNELS, SIZE, autoencoder, autoencoder_training_config
from tiny_runs import first_stage_config, write_run

from ldm.autoencoder.regularizers import VectorQuantizer
from ldm.cli import doctor
from ldm.config import shipped
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.readers.folders import ImageFolder
from ldm.doctor.first_stage import examine_first_stage, measure, published
from ldm.doctor.spectrum import radial_power
from ldm.errors import UserError
from ldm.evaluation.image_metrics import psnr
from ldm.evaluation.image_sets import ImageSet
from ldm.models.latent_scale import channel_moments, unit_variance_scale


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 5)
    return ImageSet(ImageFolder(folder, SIZE), "pictures")


def test_figures_are_those_of_the_parts(images: ImageSet) -> None:
    model = autoencoder().eval()
    figures = measure(model, images, batch_size=2)
    x = from_bytes(to_bytes(images.batch(range(5))["image"]))
    with torch.no_grad():
        rebuilt = from_bytes(to_bytes(model.decode(model.encode_mode(x))))
        noise = torch.Generator().manual_seed(0)
        latents = [
            model.encode(x[part], lambda shape: torch.randn(shape, generator=noise)) for part in ([0, 1], [2, 3], [4])
        ]
    each = psnr(rebuilt, x)
    assert figures.metrics["psnr"] == pytest.approx((each.mean().item(), each.std(correction=0).item()))
    assert figures.original == pytest.approx(radial_power(x).mean(0).tolist())
    assert figures.rebuilt == pytest.approx(radial_power(rebuilt).mean(0).tolist())
    mean, std = channel_moments(latents)
    assert figures.scale == pytest.approx(unit_variance_scale(latents).item())
    assert figures.mean == pytest.approx(mean.flatten().tolist()) and figures.std == pytest.approx(
        std.flatten().tolist()
    )
    assert figures.sheet.shape == (3, 2 * SIZE, 2 * SIZE)


def test_published_figures_are_found_by_what_a_stage_is(images: ImageSet) -> None:
    assert published("f=8, KL, 4 channels") == [("autoencoder/kl_f8", 0.9, 24.19)]
    assert len(published("f=4, VQ (8192 codes), 3 channels")) == 2  # with and without attention
    assert {name for name, *_ in published("f=32")} == {
        f"autoencoder/{name}" for name in ("kl_f32", "kl_f32_c16", "vq_f32")
    }
    every = [name for name in shipped.names() if name.startswith("autoencoder/")]
    assert len(every) == 16 and all(any(name == found for found, *_ in published(f"f={f}")) for name in every
                                    for f in [shipped.title(name).partition("f=")[2].partition(",")[0]])  # fmt: skip
    vq = measure(autoencoder(None, VectorQuantizer(16, CHANNELS)), images)
    assert (measure(autoencoder(), images).kind, vq.kind) == ("f=2, KL, 2 channels", "f=2, VQ (16 codes), 2 channels")


def test_a_channel_that_says_nothing_is_a_problem(images: ImageSet, tmp_path: Path) -> None:
    model = autoencoder()
    for moments in (0, CHANNELS):  # mean and log-variance of the first channel
        torch.nn.init.zeros_(model.quant_conv.weight[moments].detach())
        model.quant_conv.bias.detach()[moments] = -30.0 * bool(moments)

    class Bar:
        update = staticmethod(lambda count: None)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...

    *_, latents = examine_first_stage({"mine": model}, images, tmp_path, lambda total, title: Bar())
    assert latents.problems == ["the channels 0 hardly vary: they carry next to nothing"]
    assert "per_channel: true" in latents.lines[1] and (tmp_path / "first_stage.png").is_file()


def test_a_page_beside_a_released_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = write_run(tmp_path / "run", autoencoder_training_config(first_stage_config(), with_discriminator=False))
    write_pictures(tmp_path / "pictures", 3, height=20, width=24)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"broken")
    released = tmp_path / "models" / "first_stage_models" / "theirs"
    released.mkdir(parents=True)
    shutil.copyfile(run / "checkpoints" / "last.ckpt", released / "model.ckpt")
    shutil.copyfile(run / "configs" / "config.yaml", released / "config.yaml")
    monkeypatch.chdir(tmp_path)
    words = ["first-stage", "--run", "run", "--indir", "pictures", "--device", "cpu"]
    doctor.main([*words, "--html", "page.html"])
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if "KL" in line and line.startswith("  ")]
    assert rows[:2] == ["run/checkpoints/last.ckpt", "theirs"]
    for said in ("Reconstructions of 4 images", "1 files cannot be read", "f=2, KL, 4 channels", "autoencoder/kl_f2",
                 "scale of unit variance", "0.000 to 0.031"):  # fmt: skip
        assert said in printed, said
    page = Path("page.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page and "theirs" in page
    assert Path("outputs/doctor/first_stage.png").is_file()
    for more, named in (
        (["--W", "9"], "16x9"),
        (["--num", "-1"], "--num -1"),
        (["model.params.embed_dim=3"], "embed_dim"),
    ):
        with pytest.raises(SystemExit):
            doctor.main([*words, *more])
        assert named in capsys.readouterr().err.splitlines()[-1]


def test_weights_that_are_no_numbers_are_told(images: ImageSet) -> None:
    model = autoencoder()
    torch.nn.init.constant_(model.decoder.conv_out.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        measure(model, images)
