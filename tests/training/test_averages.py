"""Averages beside `model_ema`: trained, resumed, snapshotted, chosen, and other lengths made of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny import identity_config, latent_diffusion_config, node, run_config, unet_config

from ldm.cli import ema, program, train
from ldm.environment import first_name
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.models.loading import ModelSource, load_model
from ldm.weights import files as storage
from ldm.weights.load import read
from ldm.weights.post_hoc import find_snapshots, run_of

SHAPES = node("toy.shapes.Shapes", size=16, num_samples=24, fields=[])
SNAPSHOTS = {"target": "ldm.training.snapshots.Snapshots", "params": {"every_n_steps": 4}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = latent_diffusion_config(unet_config(3), identity_config(), averages={"short": 0.05, "long": 0.1})
    lightning = {"callbacks": {"image_logger": None, "snapshots": SNAPSHOTS}, "trainer": {"max_steps": 12}}
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(run_config(training, SHAPES, SHAPES, lightning=lightning)))
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    assert train.main(["-b", str(config), "-t", "-l", str(logs)]) == 0
    (folder,) = logs.iterdir()
    return folder


def test_a_run_that_goes_on_has_the_averages_and_snapshots_of_one(
    config: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["-b", str(config), "-t", "-l", str(tmp_path), "--max_steps", "6"]) == 0
    (begun,) = tmp_path.iterdir()
    resumed = begun.rename(tmp_path / "another name")
    with pytest.raises(SystemExit):
        train.main(["-r", str(resumed), "-t", "--max_steps", "12", "training.params.averages.short=0.15"])
    assert "averages.short: 0.15 asked for, but the average was begun with 0.05" in capsys.readouterr().err
    assert train.main(["-r", str(resumed), "-t", "--max_steps", "12"]) == 0
    whole, other = (storage.load(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (run, resumed))
    assert any(name.startswith("averages.long.") for name in whole)
    assert all(torch.equal(value, other[name]) for name, value in whole.items())
    assert len(find_snapshots(resumed / "snapshots")) == 8  # two of steps 4, 6, 8 and 12
    for step in (4, 8, 12):
        ours, theirs = (read(folder / "snapshots" / f"step={step:09}.safetensors") for folder in (run, resumed))
        assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_weights_are_chosen_by_the_name_of_their_average(run: Path) -> None:
    outputs = {}
    for which in ("raw", "ema", "short", "long"):
        model = load_model(ModelSource(run, weights=which)).model
        outputs[which] = model.sample(1, steps=2)
    assert len({float(image.sum()) for image in outputs.values()}) == 4
    with pytest.raises(Exception, match="longest is unknown; choose raw or ema or long or short"):
        load_model(ModelSource(run, weights="longest"))


def test_other_lengths_are_models_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["ema", "--run", str(run), "--sigma", "0.05", "0.07..0.12", "--out", str(tmp_path)]) == 0
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9 and files[0].name == "step=000000012-sigma=0.0500.safetensors"
    made = LatentDiffusion.from_pretrained(files[0]).model.state_dict()
    kept = load_model(ModelSource(run, weights="short")).model.model.state_dict()
    for name, value in kept.items():  # kept in half precision
        torch.testing.assert_close(made[name], value, atol=1e-3, rtol=2e-3)


def test_snapshots_of_another_run_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = shutil.copytree(run, tmp_path / "renamed")
    words = ["ema", "--run", str(renamed), "--sigma", "0.07", "--out", str(tmp_path / "out")]
    assert program.main(words) == 0
    for file in (renamed / "snapshots").iterdir():
        texts = storage.safetensors_metadata(file)
        assert texts["run"] == run.name
        storage.write_safetensors(file, storage.read_safetensors(file), {**texts, "run": "another"})
    with pytest.raises(SystemExit):
        program.main(words)
    assert f"another run (another; this one is {run.name}); keep those of this run" in capsys.readouterr().err


def test_a_run_that_is_renamed_before_its_first_snapshot_keeps_its_name(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["-b", str(config), "-t", "-l", str(tmp_path), "--max_steps", "1", "lightning.callbacks.snapshots=null"]
    assert train.main(begin) == 0
    (begun,) = tmp_path.iterdir()
    renamed = begun.rename(tmp_path / "renamed")
    assert train.main(["-b", str(config), "-r", str(renamed), "-t", "--max_steps", "4"]) == 0
    assert run_of(renamed / "snapshots") == first_name(renamed) == begun.name
    assert program.main(["ema", "--run", str(renamed), "--sigma", "0.07"]) == 0


@pytest.mark.parametrize(("words", "named"), [(["--sigma", "0.5"], "0.5"), (["--sigma", "0.1", "--step", "99"], "99")])
def test_mistakes(run: Path, words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ema.main(["--run", str(run), "--out", str(tmp_path), *words])
    assert named in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["0.05", "7", "a.b", "''", "keys", "training", "_modules", "ema", "raw"])
@pytest.mark.parametrize("words", [["--dry-run"], []], ids=["dry", "run"])
def test_names_that_an_average_cannot_have(
    name: str, words: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"training.params.averages={{{name}: 0.05}}", "lightning.callbacks.snapshots=null", *words]
    with pytest.raises(SystemExit):
        train.main(["-b", str(config), "-t", "-l", str(tmp_path), *given])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: training: averages: ") and "cannot be a name; use a word" in line
    assert not list(tmp_path.iterdir())


def test_snapshots_need_averages(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["-b", str(config), "-t", "-l", str(tmp_path), "training.params.averages=null"])
    assert "training.params.averages" in capsys.readouterr().err
