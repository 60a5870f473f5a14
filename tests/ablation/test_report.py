"""The report has the numbers of the results, and what is not there yet is left out."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ldm.ablation import tables
from ldm.ablation.jobs import Evaluation, Training
from ldm.ablation.plan import Programs, StudyPlan, plan
from ldm.ablation.report import report_folder, write_report
from ldm.ablation.resolving import resolve
from ldm.ablation.study import read
from ldm.ablation.workspace import NUMBERED, PACE_STEPS, Place, Workspace
from ldm.errors import UserError

STUDY = Path(__file__).resolve().parents[2] / "configs" / "ablation" / "toy_f.yaml"
PROGRAMS = Programs(Path("main.py"), Path("scripts/evaluate.py"))
CPU = Place(("--accelerator", "cpu"), "cpu")
FRECHET = {4: {1: 40.0, 2: 30.0}, 8: {1: 20.0, 2: 10.0}}  # by f and seed
SECONDS_OF_A_STEP = 0.5


@pytest.fixture(scope="module")
def whole() -> StudyPlan:
    study = read(STUDY)
    study = replace(study, axes={"f": {f: study.axes["f"][f] for f in FRECHET}}, seeds=(1, 2))
    return plan(study, resolve(study), PROGRAMS)


def finish(job, workspace: Workspace, seconds: float | None = 60.0) -> None:
    workspace.done(job.name).write_text(json.dumps({"seconds": seconds}))


def trained(job: Training, workspace: Workspace) -> None:
    """Leave what a training leaves, as far as it is read."""
    job.command(workspace, CPU)
    checkpoints = workspace.place("runs", f"2026-01-01T00-00-00_{job.name}") / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save({"global_step": 1}, checkpoints / "last.ckpt")
    for step in (PACE_STEPS // 2, PACE_STEPS):
        path = checkpoints / NUMBERED.format(step)
        path.touch()
        os.utime(path, (0, step * SECONDS_OF_A_STEP))
    finish(job, workspace)


def evaluated(job: Evaluation, workspace: Workspace, values: dict[str, float]) -> None:
    """Leave what an evaluation leaves."""
    folder = workspace.place("evaluations", job.name)
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"values": values, "n": 500, "made": {"draw_seconds": 10.0}}))
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    finish(job, workspace)


@pytest.fixture
def finished(whole, tmp_path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.create()
    for job in whole.jobs:
        if isinstance(job, Training):
            trained(job, workspace)
    for entry in whole.entries:
        value = FRECHET[entry.resolved.trial.labels["f"]][entry.resolved.trial.seed]
        if not workspace.done(entry.first_stage.name).exists():
            evaluated(entry.first_stage, workspace, {"psnr": 30.0, "psnr_std": 2.0})
        for job in (*entry.curve, *entry.final.values()):
            evaluated(job, workspace, {"frechet[scenenet]": value})
    return workspace


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_and_numbers_of_a_finished_study(whole, finished):
    page = write_report(whole, finished)
    files = {path.name for path in page.parent.iterdir()}
    pictures = {"progress.png", "throughput.png", "axis_f.png"}
    assert files == pictures | {"report.html", "trials.csv", "first_stages.csv", "progress.csv", "throughput.csv"}
    text = page.read_text()
    assert "http" not in text and text.count("data:image/png") == len(pictures) + 2 * 2  # and two sheets for each f
    assert "frechet[scenenet], from low to high (less is better): f=8 (15), f=4 (35)." in text
    assert "35 ± 5" in text and "30 ± 2" in text


def test_progress_counts_what_was_trained(whole, finished):
    write_report(whole, finished)
    found = [
        row for row in rows(report_folder(whole, finished) / "progress.csv") if row["f"] == "4" and row["seed"] == "1"
    ]
    steps = int(4 * 60 / SECONDS_OF_A_STEP / 4)  # of a quarter of four minutes
    assert [int(row["step"]) for row in found] == [steps, 2 * steps, 3 * steps, 4 * steps]
    assert [float(row["minutes"]) for row in found] == pytest.approx([1.0, 2.0, 3.0, 4.0])
    assert [int(row["samples"]) for row in found] == [32 * int(row["step"]) for row in found]


def test_lines_of_progress_go_through_the_mean_of_seeds_of_another_pace(whole, finished):
    training = next(entry.training for entry in whole.entries if entry.resolved.trial.seed == 2)
    config = finished.config(training.name)
    content = yaml.safe_load(config.read_text())
    steps = content["lightning"]["trainer"]["max_steps"]
    content["lightning"]["trainer"]["max_steps"] = 2 * steps  # its machine was twice as fast
    config.write_text(yaml.safe_dump(content))
    found = tables.progress(whole, finished)
    means = [row for row in tables.over_seeds(found, ["f", "part"]) if row["f"] == training_f(whole, training)]
    assert [row["part"] for row in means] == [1, 2, 3, 4]
    assert [row["step"] for row in means] == [1.5 * steps * part / 4 for part in (1, 2, 3, 4)]
    assert [row["samples"] for row in means] == [32 * row["step"] for row in means]
    page = write_report(whole, finished)
    assert f"{round(1.5 * steps)} ± {steps // 2}" in page.read_text()


def training_f(whole, training: Training) -> int:
    return next(entry.resolved.trial.labels["f"] for entry in whole.entries if entry.training == training)


def test_speed_is_that_of_drawing_also_where_an_evaluation_was_interrupted(whole, finished):
    finish(whole.entries[0].final[50], finished, seconds=None)
    rows = tables.throughput(whole, finished)
    assert all(row["samples/s"] == 50.0 for row in rows)
    facts, labels = whole.entries[0].resolved.facts, whole.entries[0].resolved.trial.labels
    costs = {row["sampling steps"]: row["GFLOP a sample"] for row in rows if row["f"] == labels["f"]}
    assert costs[50] == pytest.approx((50 * facts.network_flops + facts.decoder_flops) / 1e9)


def test_a_study_under_way_is_reported_as_far_as_it_is(whole, tmp_path):
    page = write_report(whole, Workspace(tmp_path))
    assert "1,856,579" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "trials.csv"}


def test_other_seeds_and_another_study_have_a_report_of_their_own(whole, tmp_path):
    workspace = Workspace(tmp_path)
    studies = [whole.study, replace(whole.study, seeds=(3,)), replace(whole.study, title="another")]
    assert len({report_folder(replace(whole, study=study), workspace) for study in studies}) == 3


def test_the_pace_is_measured_without_validation(whole, finished):
    entry = whole.entries[0]
    trainers = [
        yaml.safe_load(finished.config(job.name).read_text())["lightning"]["trainer"]
        for job in (entry.pace, entry.training)
    ]
    assert trainers[0]["limit_val_batches"] == 0 and "limit_val_batches" not in trainers[1]


def test_a_training_goes_on_with_its_run_and_keeps_a_checkpoint_of_each_part(whole, finished):
    training = whole.entries[0].training
    content = yaml.safe_load(finished.config(training.name).read_text())
    part = content["lightning"]["modelcheckpoint"]["params"]["keep_every_n_steps"]
    assert content["lightning"]["trainer"]["max_steps"] == 4 * part
    assert content["model"]["params"]["autoencoder"]["checkpoint"] == str(finished.run(training.first_stage))
    assert "every_n_steps" not in content["lightning"]["modelcheckpoint"]["params"]  # a part may take days
    assert "--resume" in training.command(finished, CPU)
    with pytest.raises(UserError, match="was stopped at step 1 of"):
        run = finished.run(training.name)
        (run / "configs").mkdir()
        (run / "configs" / "config.yaml").write_text(yaml.safe_dump(content))
        training.check(finished)


def test_a_file_that_is_no_result_is_named(whole, finished):
    job = whole.entries[0].final[50]
    (finished.place("evaluations", job.name) / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"evaluation.json: is no result of scripts/evaluate.py"):
        write_report(whole, finished)
