import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from foreign_nodes import latent_diffusion
from PIL import Image
from tiny import (
    autoencoder_config,
    autoencoder_training_config,
    latent_diffusion_config,
    node,
    run_config,
    text_config,
    unet_config,
)

from ldm.cli.train import main
from ldm.config import load
from ldm.training.plan import RunOptions
from ldm.training.run import train
from ldm.training.run_folder import new_run, resume_run
from ldm.weights import files as storage

WORDS = ("red", "green", "blue")


AUTOENCODER = autoencoder_config()
UNTRAINED = "training.allow_untrained_first_stage=true"


class Failing(pl.Callback):
    """Stands for a mistake in the program."""

    def on_train_batch_start(self, *args: Any) -> None:
        raise ZeroDivisionError


class Hungry(pl.Callback):
    """Asks for more memory than any machine has, at the fourth step."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            torch.empty(2**50)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make twelve pictures of one colour each, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[..., number % 3] = 200 + number
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {WORDS[number % 3]} picture")
    return folder


def write(path: Path, model: dict[str, Any], pictures: Path) -> str:
    data = node("data.readers.captions.CaptionedFolder", root=str(pictures), size=8)
    lightning = {
        "trainer": {"max_steps": 4},
        "modelcheckpoint": {"params": {"every_n_steps": 2}},
        "callbacks": {"image_logger": {"params": {"every_n_steps": 4, "sampler": node("sampling.ddim.DDIM", steps=2)}}},
    }
    config = run_config(model, data, data, batch_size=4, lightning=lightning)
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Train an autoencoder and give its run folder."""
    folder = tmp_path_factory.mktemp("first")
    config = write(folder / "kl.yaml", autoencoder_training_config(AUTOENCODER), pictures)
    assert main(["--base", config, "-t", "-l", str(folder / "logs"), "-n", "kl", "-f", "_x", "-s", "7"]) == 0
    (run,) = (folder / "logs").iterdir()
    return run


@pytest.fixture
def latent_config(tmp_path: Path, pictures: Path) -> str:
    network = unet_config(attention_factors=[1], context_dim=8)
    model = latent_diffusion_config(network, AUTOENCODER, text_config(max_length=6), latent_scale="measure")
    return write(tmp_path / "text.yaml", model, pictures)


def content(run: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return storage.load(run / "checkpoints" / name)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def refusal(words: list[str], capsys: Any) -> str:
    """Return what a refused command line writes to stderr."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 1
    return capsys.readouterr().err


def test_run_folder_has_all_that_a_run_leaves(first_stage: Path) -> None:
    assert first_stage.name.endswith("_kl_x")
    assert content(first_stage)["global_step"] == 4
    resolved = yaml.safe_load((first_stage / "configs" / "config.yaml").read_text())
    assert resolved["training"]["global_batch"] == 4 and resolved["training"]["learning_rate"] == 1e-3
    environment = json.loads((first_stage / "configs" / "environment.json").read_text())
    assert environment["seed"] == 7 and "torch" in environment["versions"]
    assert {row["step"] for row in rows(first_stage)} >= {"1", "2", "3", "4"}
    assert any(row.get("val/rec_loss") for row in rows(first_stage))
    assert list((first_stage / "images" / "train").glob("reconstructions_gs-000004_*.png"))
    said = (first_stage / "train.log").read_text()
    assert "global batch: 4 = 4 per device x 1 devices x 1 nodes x 1 accumulated" in said


def test_latent_model_trains_on_it_and_goes_on(latent_config: str, first_stage: Path, tmp_path: Path) -> None:
    weights = f"model.params.autoencoder.checkpoint={first_stage}"
    logs = tmp_path / "logs"
    assert main(["-b", latent_config, "-t", "-l", str(logs), weights]) == 0
    (run,) = logs.iterdir()
    first = content(run)["state_dict"]
    torch.testing.assert_close(
        first["first_stage_model.encoder.conv_in.weight"], content(first_stage)["state_dict"]["encoder.conv_in.weight"]
    )
    assert "red" in (run / "configs" / "vocab.txt").read_text().split()
    assert float(first["scale_factor"]) not in (0.0, 1.0)
    assert main(["-r", str(run), "-t", "--max_steps", "6"]) == 0
    assert content(run)["global_step"] == 6
    assert [row["step"] for row in rows(run) if row["train/loss"]] == ["1", "2", "3", "4", "5", "6"]
    assert list((run / "configs").glob("config-*.yaml"))  # the config before max_steps changed
    assert list(logs.iterdir()) == [run]


def test_a_training_is_a_function_of_a_config(latent_config: str, first_stage: Path, tmp_path: Path) -> None:
    config = load(latent_config, ["lightning.trainer.log_every_n_steps=2"])
    config.model.params.autoencoder.checkpoint = str(first_stage)
    run, cpu = new_run(tmp_path / "logs", "mine"), RunOptions(accelerator="cpu")
    result = train(config, run, seed=3, options=cpu)
    assert result.folder == run.path and result.checkpoint == run.checkpoints / "last.ckpt"
    assert result.global_step == content(run.path)["global_step"] == 4
    assert 0 < result.seconds_per_step < 60
    assert result.metrics["train/loss"] == pytest.approx(float(rows(run.path)[-1]["train/loss"]), rel=1e-4)
    assert main(["-b", latent_config, "-t", "-l", str(tmp_path / "command"), "-s", "3", "--accelerator", "cpu",
                 f"model.params.autoencoder.checkpoint={first_stage}"]) == 0  # fmt: skip
    (command,) = (tmp_path / "command").iterdir()
    other = content(command)["state_dict"]
    assert all(torch.equal(value, other[name]) for name, value in content(run.path)["state_dict"].items())
    longer = train(config, resume_run(run.path), options=replace(cpu, max_steps=6))
    assert longer.global_step == 6 and longer.folder == run.path
    assert math.isnan(train(config, resume_run(run.path), options=replace(cpu, max_steps=6)).seconds_per_step)


def test_cached_latents_give_the_same_training(latent_config: str, first_stage: Path, tmp_path: Path) -> None:
    words = ["-b", latent_config, "-t", f"model.params.autoencoder.checkpoint={first_stage}"]
    cached = "lightning.cache_latents.views=1"
    runs = {"plain": [[]], "cached": [[cached]], "resumed": [[cached, "--max_steps", "2"], ["--max_steps", "4"]]}
    states = {}
    for name, (first, *later) in runs.items():
        assert main([*words, *first, "-l", str(tmp_path / name)]) == 0
        (run,) = (tmp_path / name).glob("*_text")  # beside it lies the cache
        for more in later:  # the latents of the run that goes on are those of its first stage, not of a new one
            assert main(["-r", str(run), "-t", *more]) == 0
        states[name] = content(run)["state_dict"]
    for name, value in states["plain"].items():
        torch.testing.assert_close(value, states["cached"][name], msg=name)
        assert torch.equal(states["cached"][name], states["resumed"][name]), name


@pytest.mark.parametrize("dialect", ["ours", "theirs"])
def test_dry_run_of_a_model_alone(dialect: str, latent_config: str, tmp_path: Path, capsys: Any) -> None:
    """As published configs for inference are, which have no section but `model`."""
    content = yaml.safe_load(Path(latent_config).read_text())
    content = {"model": content["model"], "training": content["training"]}
    if dialect == "theirs":
        content = {"model": {"base_learning_rate": 1e-6, **latent_diffusion()}}
    alone = tmp_path / "v1-inference.yaml"
    alone.write_text(yaml.safe_dump(content))
    words = ["-b", str(alone), "-l", str(tmp_path / "logs"), "--accelerator", "cpu", "--devices", "1"]
    words += ["lightning.callbacks.image_logger=null"]  # whose 50 steps the few of this process do not have
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "data" not in yaml.safe_load(printed) and "# global batch: 1 = " in printed
    assert "# training would stop here: " in printed
    assert "data: missing" in refusal([*words, "-t"], capsys)
    assert not (tmp_path / "logs").exists()


def test_dry_run_needs_neither_data_nor_weights(latent_config: str, tmp_path: Path, capsys: Any) -> None:
    words = ["model.params.autoencoder.checkpoint=absent.ckpt", "data.params.train.params.root=absent", "--gpus", "8"]
    assert main(["-b", latent_config, "--dry-run", "-l", str(tmp_path / "logs"), *words]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["params"]["autoencoder"]["checkpoint"] == "absent.ckpt"
    assert "# global batch: 32 = 4 per device x 8 devices" in printed
    assert "first_stage_model:" in printed and ", 0 trained" in printed
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "first stage has no trained weights"),
        (["model.params.autoencoder.checkpoint=absent.ckpt"], "absent.ckpt: no such checkpoint"),
        (["--gpus", "999"], "GPU 999 of them asked for"),
        (["data.params.train.params.root=absent", UNTRAINED], "absent"),
        (["data.params.validation.params.size=9", UNTRAINED], "validation: .* size 9x9"),
        (["model.params.image_key=photo", UNTRAINED], "reads 'photo'"),
        (["lightning.callbacks.mine.params.x=1", UNTRAINED], "needs a target"),
        (["lightning.cache_latents=[1]", UNTRAINED], "cache_latents: .* not understood"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    latent_config: str, tmp_path: Path, capsys: Any, words: list[str], message: str
) -> None:
    said = refusal(["-b", latent_config, "-t", "-l", str(tmp_path / "logs"), *words], capsys)
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and said.count("error: ") == 1
    assert "Traceback" not in said
    assert re.search(message, last)
    assert not any((tmp_path / "logs").glob("*"))


def test_nothing_is_trained_without_being_asked(latent_config: str, capsys: Any) -> None:
    assert "add -t to train" in refusal(["-b", latent_config], capsys)


def test_a_lack_of_memory_is_one_line_with_what_was_asked_for_and_how_to_go_on(
    latent_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [UNTRAINED, f"lightning.callbacks.hungry.target={__name__}.Hungry"]
    with pytest.raises(SystemExit) as caught:
        main(["-b", latent_config, "-t", "-l", str(tmp_path / "logs"), *words])
    (run,) = (tmp_path / "logs").iterdir()
    said = capsys.readouterr().err
    assert caught.value.code == 1 and "Traceback" not in said
    assert str(2**52) in said.splitlines()[-1] and f"-t -r {run}" in said.splitlines()[-1]
    assert storage.load(run / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_what_a_callback_of_lightning_says_of_its_settings_is_one_line(
    latent_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = "{target: pytorch_lightning.callbacks.%s}"
    stopping = callbacks % "EarlyStopping, params: {monitor: nothing}"
    averaging = callbacks % "StochasticWeightAveraging, params: {swa_lrs: 0.1}"
    for callback, named in ((stopping, "`nothing` which is not available"), (averaging, "SWA with `swa_epoch_start`")):
        words = ["-l", str(tmp_path / "logs"), UNTRAINED, f"lightning.callbacks.x={callback}"]
        assert named in refusal(["-b", latent_config, "-t", *words], capsys)


def test_errors_of_the_program_keep_their_type_and_are_logged(latent_config: str, tmp_path: Path) -> None:
    words = [UNTRAINED, f"lightning.callbacks.failing.target={__name__}.Failing"]
    with pytest.raises(ZeroDivisionError):
        main(["-b", latent_config, "-t", "-l", str(tmp_path / "logs"), *words])
    (run,) = (tmp_path / "logs").iterdir()
    assert "Traceback" in (run / "train.log").read_text()
