"""What has no effect in a config is found by leaving it out, whatever dialect it is written in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from breakage.processes import write_config
from foreign_nodes import latent_diffusion

from ldm import compat
from ldm.cli import doctor
from ldm.doctor.config import without_effect


def report(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert doctor.main(["config", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_defaults_are_told_from_what_changes_something() -> None:
    options = {"target": "ldm.networks.unet.UNetOptions", "params": {"dropout": 0.0, "dims": 1}}
    network = {"target": "ldm.networks.unet.UNet", "params": {"in_channels": 3, "options": options}}
    sizes = {"target": "ldm.data.readers.folders.ImageFolder", "params": {"size": 8, "flip": 0.5, "crop": "center"}}
    unused, usual = without_effect({"model": network, "data": {"params": {"train": sizes}}})
    assert unused == []
    assert usual == ["model.params.options.params.dropout: 0.0", "data.params.train.params.crop: center"]


def test_what_a_translation_leaves_out_is_not_used() -> None:
    foreign = latent_diffusion(monitor="val/loss", scale_factor=0.5, use_ema=True)
    foreign["base_learning_rate"] = 1e-6
    unused, _ = without_effect({"model": foreign})
    assert "model.params.monitor: val/loss" in unused
    assert not any("scale_factor" in line or "learning_rate" in line for line in unused)
    whole = compat.translate({"model": foreign})
    for line in unused:  # the rule itself
        *keys, last = line.partition(": ")[0].split(".")
        holder = rest = yaml.safe_load(yaml.safe_dump({"model": foreign}))
        for key in keys:
            holder = holder[key]
        del holder[last]
        assert compat.translate(rest) == whole, line


def test_differences_of_shipped_configs_and_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, "ldm/sit_s", "ldm/sit_b")
    at = next(number for number, line in enumerate(lines) if line.startswith("ldm/sit_s against ldm/sit_b: "))
    assert "  model.params.network.params.hidden_size: 384, 768" in lines[at + 1 :]
    run = tmp_path / "run" / "configs"
    run.mkdir(parents=True)
    write_config(tmp_path).rename(run / "config.yaml")
    lines = report(capsys, str(tmp_path / "run"), str(run / "config.yaml"), "lightning.trainer.max_steps=77")
    assert [line for line in lines if "max_steps" in line and ", " in line] == ["  lightning.trainer.max_steps: 77, 6"]


def test_open_values_are_the_users_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, str(write_config(tmp_path)), "data.params.train.params.seed=???")
    assert lines[lines.index("Yours to give") + 1] == "  data.params.train.params.seed"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["CONFIG", "model.params.network.params.chanel_mult=[1]"], "did you mean channel_mult"),
        (["CONFIG", "training.learning_rate=0"], "is no positive number"),
        (["CONFIG", "lightning.trainer.max_step=1"], "did you mean max_steps"),
        (["FOLDER"], "has no config in it"),
        (["ldm/sit_s", "ldm/sit_z"], "no such file"),
    ],
)
def test_mistakes(words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path))
    (tmp_path / "empty").mkdir()
    places = {"CONFIG": config, "FOLDER": str(tmp_path / "empty")}
    with pytest.raises(SystemExit):
        doctor.main(["config", *(places.get(word, word) for word in words)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and named in said and len(said) < 310
