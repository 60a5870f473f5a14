"""Guidance of previews and sample metrics: guides that are averages of the training, or runs; mistakes told early."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fitting import fit, largest_difference
from PIL import Image, ImageChops
from tiny import (
    WIDTH,
    autoencoder_config,
    class_diffusion,
    identity_config,
    latent_diffusion_config,
    node,
    run_config,
    text_config,
    unet_config,
)

from ldm.cli import train
from ldm.errors import UserError
from ldm.models import loading
from ldm.models.guidance import Guidance
from ldm.sampling.ddim import DDIM
from ldm.training.callbacks import ImageLogger, check_previews
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.training.live_guidance import LiveGuidance
from ldm.training.sample_metrics import SampleMetrics

AVERAGES = {"long": 0.2}


def conditioner_config(num_classes: int, **options: Any) -> dict[str, Any]:
    return node("conditioning.labels.ClassConditioner", num_classes=num_classes, embed_dim=WIDTH, **options)


def weaker(folder: Path, name: str = "weaker", **options: Any) -> str:
    """Save an earlier `class_diffusion` and return where."""
    section = latent_diffusion_config(
        unet_config(context_dim=WIDTH), autoencoder_config(), conditioner_config(4, null_label=3, drop_rate=0.3)
    )["params"]["model"]
    section["params"] |= options
    return str(class_diffusion(1, **options).model.save_pretrained(folder / name, section))


def ready(module: DiffusionTraining, guide: Any) -> Guidance:
    return LiveGuidance(Guidance(3.0, guide=guide), "place").ready(module)


def predicted(module: DiffusionTraining, guide: str) -> torch.Tensor:
    guidance, batch = ready(module, guide), {"class_label": [0, 1]}
    with module.ema_scope(), torch.no_grad():
        return guidance.denoiser_of_guide(batch)(torch.ones(2, 2, 4, 4), torch.tensor([9.0, 9.0])).x0


@pytest.mark.parametrize("name", ["long", "raw"])
def test_a_guide_may_be_an_average_that_the_training_keeps(name: str, tmp_path: Path) -> None:
    module = class_diffusion(averages=AVERAGES)
    fit(module, tmp_path, 4)
    module.eval()
    other = class_diffusion().eval()
    other.model.load_state_dict(module.model.state_dict())
    if name == "long":
        module.averages["long"].copy_to(other.averaged)
    with torch.no_grad():
        denoise = other.model.denoiser(other.model.condition({"class_label": [0, 1]}))
        expected = denoise(torch.ones(2, 2, 4, 4), torch.tensor([9.0, 9.0])).x0
    torch.testing.assert_close(predicted(module, f"ema:{name}"), expected)
    assert not torch.equal(predicted(module, "ema:long"), predicted(module, "ema:raw"))


def test_previews_and_metrics_have_averages_as_guides_and_change_nothing(tmp_path: Path) -> None:
    quiet, watched = class_diffusion(averages=AVERAGES), class_diffusion(averages=AVERAGES)
    fit(quiet, tmp_path, 4)
    options = {"every_n_steps": 4, "guidance": Guidance(3.0, guide="ema:long")}
    callbacks = [
        ImageLogger(tmp_path / "images", sampler=DDIM(3), **options),
        SampleMetrics(tmp_path / "images", count=6, steps=2, **options),
    ]
    check_previews(callbacks, watched)
    logger = [MetricsCsv(tmp_path / "metrics.csv")]
    fit(watched, tmp_path, 4, callbacks=callbacks, with_validation=True, logger=logger)
    assert largest_difference(quiet.state_dict(), watched.state_dict()) == 0
    images = [
        Image.open(next((tmp_path / "images" / "train").glob(f"{name}_gs-*"))) for name in ("samples", "samples_guided")
    ]
    assert ImageChops.difference(*images).getbbox()
    assert "samples/frechet" in (tmp_path / "metrics.csv").read_text()


def test_a_guide_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide, read, whole = weaker(tmp_path), [], loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *given: read.append(given) or whole(*given))
    options = {"every_n_steps": 1, "guidance": Guidance(3.0, guide=guide)}
    callback = ImageLogger(tmp_path / "images", sampler=DDIM(2), **options)
    module = class_diffusion()
    check_previews([callback], module)
    fit(module, tmp_path, 3, callbacks=[callback])
    assert len(read) == 1 and len(list((tmp_path / "images" / "train").glob("samples_guided_*"))) == 3


def test_previews_are_guided_away_from_a_negative_condition(tmp_path: Path) -> None:
    def preview(**guidance: Any) -> bytes:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        callback = ImageLogger(folder, sampler=DDIM(2), every_n_steps=1, guidance=Guidance(3.0, **guidance))
        module = class_diffusion()
        check_previews([callback], module)
        fit(module, folder, 1, callbacks=[callback])
        return next((folder / "train").glob("samples_guided_*")).read_bytes()

    assert preview() == preview() != preview(negative={"class_label": 1})
    with pytest.raises(UserError, match="image_logger.params.guidance: negative: .*not conditioned on text"):
        preview(negative="blurry")


def test_a_guide_is_compared_with_a_latent_scale_that_the_training_measures(tmp_path: Path) -> None:
    guidance = Guidance(3.0, guide=weaker(tmp_path, latent_scale=0.001))
    callback = ImageLogger(tmp_path / "images", sampler=DDIM(2), guidance=guidance)
    module = class_diffusion(latent_scale="measure")
    check_previews([callback], module)
    with pytest.raises(UserError, match=r"image_logger.params.guidance: guide .*latent scale is 0.001, that of"):
        fit(module, tmp_path, 3, callbacks=[callback])
    assert not (tmp_path / "images").exists()


# ---------------------------------------------------------------------------------------------- from the command line


def write_config(folder: Path, conditioner: dict[str, Any] | None = None, captions: bool = False) -> Path:
    fields = ["caption"] if captions else ["class_label"]
    data = node("toy.shapes.Shapes", size=16, num_samples=8, fields=fields)
    conditioner = conditioner or conditioner_config(32, null_label=31, drop_rate=0.1)
    training = latent_diffusion_config(
        unet_config(3, context_dim=WIDTH), identity_config(), conditioner, averages={"short": 0.05}
    )
    sampler = node("sampling.ddim.DDIM", steps=2)
    lightning = {
        "callbacks": {"image_logger": {"params": {"every_n_steps": 1, "sampler": sampler}}},
        "trainer": {"max_steps": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(training, data, data, lightning=lightning)))
    return path


def words(config: Path, logs: Path, guidance: str, callback: str) -> list[str]:
    place = f"lightning.callbacks.{callback}"
    target = [] if callback == "image_logger" else [f"{place}.target=ldm.training.sample_metrics.SampleMetrics"]
    given = [f"{place}.params.{guidance}"]
    return ["-b", str(config), "-t", "-l", str(logs), *target, *given]


def refused(words: list[str], logs: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line with which a training and its dry run end; neither leaves a folder."""
    told = []
    for more in (["--dry-run"], []):
        with pytest.raises(SystemExit) as stop:
            train.main([*words, *more])
        assert stop.value.code == 1 and not logs.exists()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        told.append(line)
    assert told[0] == told[1]
    return told[0]


GUIDED = "guidance={target: ldm.models.guidance.Guidance, params: {scale: 3, guide: '%s'}}"


@pytest.mark.parametrize("callback", ["image_logger", "sample_metrics"])
@pytest.mark.parametrize(
    ("guide", "said"),
    [
        ("ema:longest", "guide ema:longest: .*use ema:raw or ema:short, or add it to training.params.averages"),
        ("ema:ema", "guide ema:ema: names no other average"),
        ("nowhere", "nowhere: no such checkpoint; give a file, or a run folder"),
        ("{config}", "config.yaml: no configs/config.yaml"),
        ("{guide}", "guide .*: its latents have 2 channels, those of the model 3; use an earlier"),
    ],
)
def test_guides_that_cannot_be_are_told_before_a_training(
    callback: str, guide: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, logs = write_config(tmp_path), tmp_path / "logs"
    guide = guide.format(config=config, guide=weaker(tmp_path, "guide") if "guide" in guide else "")
    line = refused(words(config, logs, GUIDED % guide, callback), logs, capsys)
    assert f"lightning.callbacks.{callback}.params.guidance: " in line
    assert re.search(said, line), line


@pytest.mark.parametrize("callback", ["image_logger", "sample_metrics"])
def test_a_scale_without_a_null_condition_is_told_before_a_training(
    callback: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, logs = write_config(tmp_path, conditioner_config(32)), tmp_path / "logs"
    line = refused(words(config, logs, "guidance_scale=3", callback), logs, capsys)
    assert f"lightning.callbacks.{callback}.params.guidance_scale: ClassConditioner: without null_label" in line


def test_a_condition_that_is_never_dropped_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write_config(tmp_path, text_config(drop_rate=0.0), captions=True)
    given = words(config, tmp_path / "logs", "guidance_scale=3", "image_logger")
    for more in (["--dry-run"], []):
        caplog.clear()
        assert train.main([*given, *more]) == 0
        assert len([line for line in caplog.messages if line.startswith("guidance 3: may harm")]) == 1
