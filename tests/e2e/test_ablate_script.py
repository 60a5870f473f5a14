"""scripts/ablate.py from nothing to the report, with kills on the way: real trainings, real evaluations."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import (
    autoencoder_config,
    autoencoder_training_config,
    identity_config,
    latent_diffusion_config,
    node,
    run_config,
    unet_config,
)
from tiny_runs import ROOT, script

from ldm.ablation.resolve import resolve
from ldm.ablation.run import run_trial, step_names
from ldm.ablation.runner import DeviceSlot
from ldm.ablation.study import read
from ldm.ablation.tables import EVALUATIONS, STEPS, Results
from ldm.ablation.workspace import Workspace

STUDY = {
    "title": "tiny",
    "first_stage": "first.yaml",
    "latent": "latent.yaml",
    "axes": {"f": {1: {"first_stage": "none"}, 2: {}}},
    "seeds": [1],
    "budget": {"steps": 4, "points": 2, "parameters": 0.0},
    "evaluation": {
        "metrics": ["frechet"], "extractor": "scenenet", "num_samples": 8, "steps": [2, 4], "curve_steps": 2,
    },
    "workers": 2,
}  # fmt: skip


@pytest.fixture
def study(tmp_path) -> Path:
    autoencoder = autoencoder_config(3, resolution=16, attention="none")
    network = unet_config(3, attention_factors=[2], channel_mult=[1, 1])
    models = {
        "first": autoencoder_training_config(autoencoder, with_discriminator=False),
        "latent": latent_diffusion_config(network, identity_config()),
    }
    shapes = {"size": 16, "fields": []}
    train = node("toy.shapes.Shapes", num_samples=32, **shapes)
    validation = node("toy.shapes.Shapes", num_samples=8, split="validation", **shapes)
    trainer = {"max_steps": 4, "val_check_interval": 4}
    for name, model in models.items():
        content = run_config(model, train, validation, batch_size=4, lightning={"trainer": trainer})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return path


def test_a_dry_run_writes_nothing(study, capsys, monkeypatch):
    monkeypatch.chdir(study.parent)
    before = sorted(study.parent.iterdir())
    script("ablate").main([str(study), "--dry-run"])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown[-3:-1]] == [["1", "1", "3x16x16"], ["2", "1", "3x8x8"]]
    assert shown[-1] == "10 jobs; every latent training: 4 steps"
    assert sorted(study.parent.iterdir()) == before


def test_a_task_without_the_size_of_its_array_is_refused(study):
    with pytest.raises(SystemExit):
        script("ablate").main([str(study), "--task", "0"])


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_number_of_workers_that_is_none_is_refused(study, workers):
    with pytest.raises(SystemExit):
        script("ablate").main([str(study), "--dry-run", f"--workers={workers}"])


def refused(study, capsys, *words) -> str:
    """Return why a study is refused; nothing is written then."""
    with pytest.raises(SystemExit):
        script("ablate").main([str(study), "--out", str(study.parent / "out"), *words])
    assert not (study.parent / "out").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("devices", ["7", "0,7", "0,", "gpu"])
def test_devices_that_this_machine_does_not_have_are_refused(study, capsys, monkeypatch, devices):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert f"devices {devices}: this machine has 2 GPUs" in refused(study, capsys, "--devices", devices)


def test_a_study_that_cannot_be_judged_here_is_refused(study, capsys):
    content = {**STUDY, "evaluation": {**STUDY["evaluation"], "extractor": "scenenet:weights=absent.safetensors"}}
    study.write_text(yaml.safe_dump(content))
    assert "scenenet: no weights at absent.safetensors" in refused(study, capsys, "--devices", "cpu")


@pytest.mark.slow
def test_a_trial_is_trained_and_evaluated_once(study, tmp_path):
    spec = read(study)
    trial = resolve(spec)[1]
    workspace, slot = Workspace(tmp_path / "out"), DeviceSlot("cpu", {"accelerator": "cpu"})
    workspace.create()
    times = []
    for _ in range(2):
        run_trial(spec, trial, workspace, slot)
        times.append({path.stem: path.stat().st_mtime_ns for path in (tmp_path / "out" / "done").glob("*.json")})
    assert times[0] == times[1] and set(times[0]) == set(step_names(spec, trial))
    assert workspace.result(trial.name)["steps"] == 4
    rows = Results(spec, [trial], workspace).evaluations()
    assert [(row["part"], row["step"], row[STEPS]) for row in rows] == [(1, 2, 2), (2, 4, 2), (2, 4, 4)]
    assert "frechet[scenenet]" in rows[0] and "psnr" in Results(spec, [trial], workspace).first_stages()[0]


@pytest.mark.slow
def test_a_trained_model_is_evaluated_by_network_evaluations_and_seeds_of_its_samples(study, tmp_path):
    first = read(study)
    workspace, slot = Workspace(tmp_path / "out"), DeviceSlot("cpu", {"accelerator": "cpu"})
    workspace.create()
    trial = resolve(first)[0]
    run_trial(first, trial, workspace, slot)
    given = {"set": {"latent.checkpoint": str(workspace.finished_run(trial.name))}, "seeds": [1, 2]}
    axes = {"sampler": {"key": "sample.sampler", "values": ["ddim", "heun"]}}
    study.write_text(yaml.safe_dump({**STUDY, **given, "axes": axes}))
    second = read(study)
    trials = resolve(second)
    for trial in trials:
        run_trial(second, trial, workspace, slot)
    rows = Results(second, trials, workspace).evaluations()
    costs = {(row["sampler"], row[STEPS]): row[EVALUATIONS] for row in rows}
    assert costs == {("ddim", 2): 2, ("ddim", 4): 4, ("heun", 2): 3, ("heun", 4): 7}
    assert len({row["frechet[scenenet]"] for row in rows}) == len(rows) == 8  # no sample is that of another seed


@pytest.mark.proof
def test_a_killed_study_goes_on_to_the_same_jobs(study):
    out = study.parent / "out"
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), str(study), "--out", str(out), "--devices", "cpu"]
    finished: dict[str, float] = {}
    for kills in range(3):
        process = subprocess.Popen(command)
        wanted, end = 3 * (kills + 1), time.monotonic() + 600
        while len(list((out / "done").glob("*.json"))) < wanted and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in (out / "done").glob("*.json")}
        assert all(now[name] == when for name, when in finished.items())  # nothing was done twice
        finished = now
    subprocess.run(command, check=True)
    assert len(list((out / "done").glob("*.json"))) == 10
    (report,) = out.glob("report-*")
    with (report / "progress.csv").open() as file:
        rows = [(row["f"], row["step"]) for row in csv.DictReader(file)]
    assert rows == [("1", "2"), ("1", "4"), ("2", "2"), ("2", "4")]
    subprocess.run([*command, "--seeds", "2"], check=True)
    assert len(list(out.glob("report-*"))) == 2
    assert len(list((out / "done").glob("first-*.json"))) == 2  # trained and judged once, for both lists of seeds
