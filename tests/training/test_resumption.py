"""A run that goes on: what is asked for is used or refused, and the record says what is used."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from breakage.processes import write_config
from PIL import Image

from ldm.cli.sample import main as sample
from ldm.cli.train import main
from ldm.data.core.module import DataModule
from ldm.data.readers.captions import CaptionedFolder
from ldm.training.resumption import data_changes, data_record
from ldm.weights import files as storage

SCHEDULE = (
    "{target: ldm.training.lr_schedules.WarmUpCosine, params: "
    "{warm_up_steps: 0, lr_min: 0.5, lr_max: 0.5, lr_start: 0.5, max_decay_steps: 9}}"
)
QUIET = ["lightning.trainer.limit_val_batches=0"]
OPTIMIZATION = "training.params.optimization"


@pytest.fixture(scope="module", params=["diffusion"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the run folder of a training of two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    words = ["-b", str(write_config(folder, request.param)), "-t", "-l", str(folder / "logs"), "--max_steps", "2"]
    assert main([*words, "training.params.ema_decay=0.9", "data.params.test=null", *QUIET]) == 0
    return next((folder / "logs").iterdir())


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def go_on(run: Path, *words: str) -> None:
    assert main(["-r", str(run), "-t", "--max_steps", "3", *words]) == 0


def refused(run: Path, capsys: Any, *words: str) -> str:
    before = {path: path.read_bytes() for path in (run / "configs").iterdir()}
    with pytest.raises(SystemExit):
        main(["-r", str(run), "-t", "--max_steps", "3", *words])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and len(last) < 400
    assert before == {path: path.read_bytes() for path in before}, "a refused start changes the record"
    return last


def group(run: Path) -> dict[str, Any]:
    return storage.load(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"][0]


def record(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "configs" / "config.yaml").read_text())


def last_rate(run: Path) -> float:
    with (run / "metrics.csv").open() as file:
        return float([row["lr_abs"] for row in csv.DictReader(file) if row["lr_abs"]][-1])


@pytest.mark.parametrize("trained", ["diffusion", pytest.param("autoencoder", marks=pytest.mark.slow)], indirect=True)
def test_the_learning_rate_asked_for_is_used_and_recorded(run: Path) -> None:
    go_on(run, "training.learning_rate=1.0e-6")
    assert group(run)["lr"] == last_rate(run) == record(run)["training"]["learning_rate"] == 1e-6
    go_on(run, "--max_steps", "4")
    assert group(run)["lr"] == 1e-6


def test_a_base_given_again_is_used(run: Path, tmp_path: Path) -> None:
    (tmp_path / "lower.yaml").write_text("training: {learning_rate: 2.0e-5}\n")
    go_on(run, "-b", str(tmp_path / "lower.yaml"))
    assert last_rate(run) == record(run)["training"]["learning_rate"] == 2e-5


def test_settings_of_the_average_and_the_optimiser_are_used(run: Path) -> None:
    node = "{target: ldm.training.optimization.Optimization, params: {betas: [0.5, 0.6], weight_decay: 0.5}}"
    go_on(run, "training.params.ema_decay=0.25", f"{OPTIMIZATION}={node}")
    state = storage.load(run / "checkpoints" / "last.ckpt")
    assert float(state["state_dict"]["model_ema.decay"]) == 0.25
    assert tuple(group(run)["betas"]) == (0.5, 0.6) and group(run)["weight_decay"] == 0.5


@pytest.mark.slow
def test_a_schedule_may_be_added_changed_and_dropped(run: Path) -> None:
    place = f"{OPTIMIZATION}.params.schedule"
    go_on(run, f"{OPTIMIZATION}.target=ldm.training.optimization.Optimization", f"{place}={SCHEDULE}")
    assert last_rate(run) == 5e-4 and group(run)["initial_lr"] == 1e-3
    assert storage.load(run / "checkpoints" / "last.ckpt")["lr_schedulers"][0]["last_epoch"] == 3
    lower = [f"{place}.params.lr_{end}=0.25" for end in ("min", "max")]
    go_on(run, "--max_steps", "4", "training.learning_rate=0.1", *lower)
    assert last_rate(run) == pytest.approx(0.025)
    go_on(run, "--max_steps", "5", f"{place}=null")
    assert last_rate(run) == 0.1 and storage.load(run / "checkpoints" / "last.ckpt")["lr_schedulers"] == []


def test_another_seed_is_used_for_all_and_told(run: Path, caplog: Any) -> None:
    go_on(run, "-s", "5")
    assert record(run)["data"]["params"]["seed"] == 5
    assert json.loads((run / "configs" / "environment.json").read_text())["seed"] == 5
    assert "seed was 23" in caplog.text and "5 from here on" in caplog.text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["training.params.ema_decay=null"], ["ema_decay", "0.9", "None"]),
        (["--max_steps", "1"], ["max_steps", "1", "2 steps"]),
        (["-s", "-1"], ["--seed", "-1"]),
        (["-s", str(2**64)], ["--seed", str(2**64)]),
    ],
)
def test_what_cannot_be_changed_is_refused_with_what_the_run_keeps(
    run: Path, capsys: Any, words: list[str], named: list[str]
) -> None:
    line = refused(run, capsys, *words)
    assert all(name in line for name in named), line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.params.network.params.model_channels=64"], ["model_channels: 32, 64", "another shape"]),
        (["model.params.latent_scale=measure"], ["latent_scale", "measure", "scale_factor"]),
        (["model.params.process.params.num_steps=30"], ["num_steps: 20, 30"]),
        (["model.params.process.params.end=0.5"], ["process", "end: None, 0.5"]),
    ],
)
def test_another_model_is_refused_with_what_the_run_keeps(
    run: Path, capsys: Any, words: list[str], named: list[str]
) -> None:
    line = refused(run, capsys, *words)
    assert all(name in line for name in named), line


def test_a_shorter_training_than_was_made_is_refused(run: Path, capsys: Any) -> None:
    assert "max_steps: 1 asked for, but the run has made 2 steps" in refused(run, capsys, "--max_steps", "1")
    content = storage.load(run / "checkpoints" / "last.ckpt")
    content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 13
    torch.save(content, run / "checkpoints" / "last.ckpt")
    said = refused(run, capsys, "lightning.trainer.max_epochs=1")
    assert "max_epochs: 1 asked for, but the run has made 13; give more" in said


@pytest.mark.parametrize(
    "key", ["training.checkpoint", "model.checkpoint", "model.params.autoencoder.checkpoint"],
)  # fmt: skip
def test_other_weights_than_its_own_are_refused(key: str, run: Path, capsys: Any) -> None:
    said = refused(run, capsys, f"{key}=elsewhere")
    assert f"{key}: elsewhere would not be read: a run that goes on has its weights in its checkpoint" in said


@pytest.mark.parametrize("damage", ["cut", "digit"])
def test_a_damaged_config_is_found_and_an_edited_one_is_confirmed(damage: str, run: Path, capsys: Any) -> None:
    config = run / "configs" / "config.yaml"
    text = config.read_text()
    config.write_text(text[: text.index("lightning:")] if damage == "cut" else text.replace("seed: 23", "seed: 22", 1))
    assert config.read_text() != text
    assert f"{config}: is not as it was written" in refused(run, capsys)
    with pytest.raises(SystemExit):
        sample(["--run", str(run), "--n_samples", "1", "--device", "cpu"])
    assert "is not as it was written" in capsys.readouterr().err.splitlines()[-1]
    if damage == "digit":
        config.write_text(config.read_text().partition("\n")[2])  # the remedy
        go_on(run)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lightning.trainer.max_steps=9"], "--max_steps and lightning.trainer.max_steps=9: give one of them"),
        (["-l", "elsewhere"], "--logdir and --resume"),
        (["-f", "_x"], "--postfix and --resume"),
        (["lightning.callbacks.image_loger=null"], "did you mean image_logger"),
        (["lightning.trainer.gradient_clip_val=-1"], "gradient_clip_val: -1 is not 0 (no clipping) or more"),
        (["lightning.trainer.val_check_interval=0"], "val_check_interval: 0 is not above 0"),
        (["lightning.trainer.limit_train_batches=0"], "limit_train_batches: 0 is not above 0"),
    ],
)  # fmt: skip
def test_what_would_be_dropped_or_do_harm_is_refused(words: list[str], said: str, run: Path, capsys: Any) -> None:
    assert said in refused(run, capsys, *words)


def test_auto_tells_that_its_base_was_edited(run: Path, tmp_path: Path, caplog: Any) -> None:
    logs, base = tmp_path / "logs", write_config(tmp_path)
    words = ["-b", str(base), "-t", "-l", str(logs), "-r", "auto", "--no-test"]
    assert main([*words, "--max_steps", "1"]) == 0
    base.write_text(base.read_text().replace("learning_rate: 0.001", "learning_rate: 0.0001"))
    assert main([*words, "--max_steps", "2"]) == 0
    (started,) = logs.iterdir()
    assert last_rate(started) == record(started)["training"]["learning_rate"] == 1e-3
    assert "training.learning_rate: 0.001, 0.0001" in caplog.text


def test_data_that_changed_is_told(run: Path, caplog: Any) -> None:
    go_on(run, "data.params.train.params.num_samples=20")
    assert "data.params.train had 12 items, now 20" in caplog.text
    caplog.clear()
    go_on(run, "--max_steps", "4")
    assert "changed since" not in caplog.text  # as at the last start


def test_what_tells_one_data_set_from_another(tmp_path: Path) -> None:
    def record(folder: str, names: str, colour: str = "red", caption: str = "a") -> Any:
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (8, 8), colour).save(tmp_path / folder / f"{name}.png")
            (tmp_path / folder / f"{name}.txt").write_text(f"{caption} {name}")
        return data_record(DataModule(1, CaptionedFolder(tmp_path / folder, size=8)))

    before = json.loads(json.dumps(record("one", "abc")))
    assert data_changes(before, record("moved", "abc")) == []
    for folder, now, said in (
        ("more", record("more", "abcd"), "had 3 items, now 4"),
        ("other", record("other", "abd"), "other names"),
        ("replaced", record("replaced", "abc", "white"), "another image in its first item"),
        ("captions", record("captions", "abc", "red", "the"), "another caption in its first item"),
    ):
        (line,) = data_changes(before, now)
        assert "data.params.train" in line and said in line, folder
    for damaged in (None, [], {"train": 3}, {"train": {"items": 3, "first": []}}):
        assert len(data_changes(damaged, record(f"again-{damaged}".replace("/", ""), "abc"))) <= 1


ILL_TYPED = {
    "moment": lambda content: content["optimizer_states"][0]["state"][3].update(exp_avg=torch.zeros(2)),
    "moment that is a text": lambda content: content["optimizer_states"][0]["state"][3].update(exp_avg_sq="x"),
    "no moment": lambda content: content["optimizer_states"][0]["state"][3].pop("exp_avg"),
    "no state": lambda content: content["optimizer_states"][0]["state"].update({3: []}),
    "progress": lambda content: progress(content)["current"].update(started={"a": 1}),
    "progress that is a text": lambda content: progress(content)["total"].update(ready="x"),
    "samples": lambda content: content.update(samples_seen="x"),
    "counts": lambda content: content["step_guard"].update(skipped="x"),
}


def progress(content: dict[str, Any]) -> dict[str, Any]:
    return content["loops"]["fit_loop"]["epoch_loop.batch_progress"]


@pytest.mark.parametrize("name", ILL_TYPED)
def test_an_ill_typed_state_is_refused_before_the_first_step(name: str, run: Path, capsys: Any) -> None:
    last = run / "checkpoints" / "last.ckpt"
    content = storage.load(last)
    ILL_TYPED[name](content)
    torch.save(content, last)
    (last.with_name("previous.ckpt")).unlink(missing_ok=True)
    assert "lacks the state of a run" in refused(run, capsys)
