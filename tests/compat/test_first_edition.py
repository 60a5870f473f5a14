"""Configs and run folders of the first edition, as they were written, are read by this one."""

import importlib
from pathlib import Path

import pytest
import torch
import yaml

from ldm import compat
from ldm.compat import first_edition
from ldm.config.plain import plain
from ldm.config.targets import find_target
from ldm.errors import UserError
from ldm.training.run import instantiate_training
from ldm.training.run_folder import RunFolder

REFERENCE = Path(__file__).parents[1] / "reference" / "first_edition"
OBJECTIVE = "ldm.diffusion.objective.Objective"


def node(target: str, **params: object) -> dict:
    return {"target": target, "params": params}


@pytest.mark.parametrize("target", sorted(set(first_edition._CLASSES.values())))
def test_classes_with_another_name_exist(target: str) -> None:
    assert callable(find_target(target))


@pytest.mark.parametrize("module", sorted(set(first_edition.MODULES.values())))
def test_modules_that_moved_exist(module: str) -> None:
    __import__(module)


@pytest.mark.parametrize("name", ["linear", "sqrt_linear", "sqrt", "cosine", "from_betas"])
def test_schedules_are_discrete_processes(name: str) -> None:
    assert callable(find_target(first_edition._target(f"ldm.diffusion.schedule.Schedule.{name}")))


@pytest.mark.parametrize("name", ["txt2img_shapes", "autoencoder_shapes"])
def test_a_run_folder_of_the_first_edition_builds_what_the_config_of_today_builds(name: str) -> None:
    old = compat.load(REFERENCE / f"{name}.yaml")
    today = compat.load(Path(__file__).parents[2] / "configs" / "demo" / f"{name}.yaml")
    assert plain(old) == plain(today)
    with torch.device("meta"):
        training = instantiate_training(plain(old))
    assert type(training).__name__ == old["training"]["target"].rpartition(".")[2]
    assert "autoencoder" not in old["training"]["params"]


def test_settings_of_training_leave_the_model() -> None:
    params = {"network": node("torch.nn.Identity"), "learn_logvar": True, "logvar_init": 0.1, "ema_decay": None}
    model = node("ldm.training.latent_diffusion.LatentDiffusion", **params) | {"checkpoint": "a", "learning_rate": 1.0}
    old = {"model": model, "data": node("ldm.data.module.DataModule", train=node("ldm.data.shards.Shards", lanes=2))}
    got = compat.translate(old)
    assert got["model"]["params"] == {"network": node("torch.nn.Identity")}
    assert got["training"]["checkpoint"] == "a" and got["training"]["learning_rate"] == 1.0
    assert got["training"]["params"] == {
        "ema_decay": None,
        "objective": node(OBJECTIVE, learn_logvar=True, logvar_init=0.1),
    }
    train = node("ldm.data.shards.shards.Shards", shuffle_streams=2)
    assert got["data"] == node("ldm.data.core.module.DataModule", train=train)
    assert compat.translate(got) == got


def test_a_first_stage_of_the_first_edition_is_named_by_file_and_by_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in ("configs", "checkpoints"):
        (run / folder).mkdir(parents=True)
    text = (REFERENCE / "autoencoder_shapes.yaml").read_text()
    (run / "configs" / "config.yaml").write_text(text)
    path = tmp_path / "latent.yaml"
    for reference in ({"run": str(run)}, {"base": str(REFERENCE / "autoencoder_shapes.yaml")}):
        path.write_text(yaml.safe_dump({"model": node("torch.nn.Identity", autoencoder=reference)}))
        got = compat.load(path).model.params.autoencoder
        assert got.target == "ldm.models.autoencoder.Autoencoder" and got.params.embed_dim == 4
        assert got.get("checkpoint") == reference.get("run")


def test_a_training_of_the_first_edition_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text((REFERENCE / "txt2img_shapes.yaml").read_text())
    with pytest.raises(UserError) as caught:
        _ = RunFolder(tmp_path, tmp_path / "checkpoints" / "last.ckpt").saved_config
    message = str(caught.value)
    assert f"training.checkpoint={tmp_path}" in message and "\n" not in message


def test_ones_own_code_may_import_modules_by_their_former_names(tmp_path: Path, monkeypatch, caplog) -> None:
    import ldm.data.readers.folders

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_the_first_edition.py").write_text("from ldm.data.folders import ImageFolder\n")
    own = importlib.import_module("of_the_first_edition")
    assert own.ImageFolder is ldm.data.readers.folders.ImageFolder
    assert "ldm.data.folders is ldm.data.readers.folders now" in caplog.text
    for name in ("ldm.data.nowhere", "ldm.nowhere"):
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)
