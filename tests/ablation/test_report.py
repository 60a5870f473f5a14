"""The report has the numbers of the results, and what is not there yet is left out."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.ablation import tables
from ldm.ablation.jobs import Evaluation, Training
from ldm.ablation.plan import StudyPlan, plan
from ldm.ablation.report import report_folder, write_report
from ldm.ablation.resolve import resolve
from ldm.ablation.study import read
from ldm.ablation.workspace import DeviceSlot, Workspace
from ldm.errors import UserError

STUDY = Path(__file__).resolve().parents[2] / "configs" / "ablation" / "toy_f.yaml"
CPU = DeviceSlot("cpu", (("accelerator", "cpu"),))
FRECHET = {4: {1: 40.0, 2: 30.0}, 8: {1: 20.0, 2: 10.0}}  # by f and seed
SECONDS_OF_A_STEP = 0.5


@pytest.fixture(scope="module")
def whole() -> StudyPlan:
    study = read(STUDY)
    study = replace(study, axes={"f": {f: study.axes["f"][f] for f in FRECHET}}, seeds=(1, 2))
    return plan(study, resolve(study))


def finish(job, workspace: Workspace, result: dict[str, Any], seconds: float | None = 60.0) -> None:
    path = workspace.path("done", f"{job.name}.json")
    path.write_text(json.dumps({"seconds": seconds, "result": result}))


def trained(job: Training, workspace: Workspace) -> None:
    """Leave what a training leaves, as far as it is read."""
    steps = job.arguments(workspace, CPU)["config"]["lightning"]["trainer"]["max_steps"]
    checkpoints = workspace.path("runs", f"2026-01-01T00-00-00_{job.name}") / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").touch()
    finish(job, workspace, {"steps": steps, "seconds_per_step": SECONDS_OF_A_STEP})


def evaluated(job: Evaluation, workspace: Workspace, values: dict[str, float], seconds: float | None = 60.0) -> None:
    """Leave what an evaluation leaves."""
    folder = workspace.path("evaluations", job.name)
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    finish(job, workspace, {"values": values, "n": 500, "made": {"draw_seconds": 10.0}}, seconds)


@pytest.fixture
def finished(whole, tmp_path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.create()
    for job in whole.jobs:
        if isinstance(job, Training):
            trained(job, workspace)
    for trial in whole.trials:
        value = FRECHET[trial.resolved.trial.labels["f"]][trial.resolved.trial.seed]
        if not workspace.is_done(trial.first_stage.name):
            evaluated(trial.first_stage, workspace, {"psnr": 30.0, "psnr_std": 2.0})
        for job in (*trial.curve, *trial.final.values()):
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


def test_lines_of_progress_go_through_the_mean_of_seeds_of_another_speed(whole, finished):
    training = next(trial.training for trial in whole.trials if trial.resolved.trial.seed == 2)
    result = finished.result(training.name)
    steps = result["steps"]
    finish(training, finished, {**result, "steps": 2 * steps})  # its machine was twice as fast
    found = tables.progress(whole, finished)
    means = [row for row in tables.over_seeds(found, ["f", "part"]) if row["f"] == training_f(whole, training)]
    assert [row["part"] for row in means] == [1, 2, 3, 4]
    assert [row["step"] for row in means] == [1.5 * steps * part / 4 for part in (1, 2, 3, 4)]
    assert [row["samples"] for row in means] == [32 * row["step"] for row in means]
    page = write_report(whole, finished)
    assert f"{round(1.5 * steps)} ± {steps // 2}" in page.read_text()


def training_f(whole, training: Training) -> int:
    return next(trial.resolved.trial.labels["f"] for trial in whole.trials if trial.training == training)


def test_speed_is_that_of_drawing_also_where_an_evaluation_was_interrupted(whole, finished):
    evaluated(whole.trials[0].final[50], finished, {"frechet[scenenet]": 1.0}, seconds=None)
    rows = tables.throughput(whole, finished)
    assert all(row["samples/s"] == 50.0 for row in rows)
    cost, labels = whole.trials[0].resolved.cost, whole.trials[0].resolved.trial.labels
    costs = {row["sampling steps"]: row["GFLOP a sample"] for row in rows if row["f"] == labels["f"]}
    assert costs[50] == pytest.approx((50 * cost.network_flops + cost.decoder_flops) / 1e9)


def test_a_study_under_way_is_reported_as_far_as_it_is(whole, tmp_path):
    page = write_report(whole, Workspace(tmp_path))
    assert "1,856,579" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "trials.csv"}


def test_other_seeds_and_another_study_have_a_report_of_their_own(whole, tmp_path):
    workspace = Workspace(tmp_path)
    studies = [whole.study, replace(whole.study, seeds=(3,)), replace(whole.study, title="another")]
    assert len({report_folder(replace(whole, study=study), workspace) for study in studies}) == 3


def test_the_speed_is_measured_without_validation(whole, finished):
    trial = whole.trials[0]
    trainers = [job.config(finished)["lightning"]["trainer"] for job in (trial.speed, trial.training)]
    assert trainers[0]["limit_val_batches"] == 0 and "limit_val_batches" not in trainers[1]


def test_a_training_goes_on_with_its_run_and_keeps_a_checkpoint_of_each_part(whole, finished):
    training = whole.trials[0].training
    arguments = training.arguments(finished, CPU)
    content = arguments["config"]
    checkpoints = content["lightning"]["modelcheckpoint"]["params"]
    assert content["lightning"]["trainer"]["max_steps"] == 4 * checkpoints["keep_every_n_steps"]
    assert content["model"]["params"]["autoencoder"]["checkpoint"] == str(finished.run(training.first_stage))
    assert "every_n_steps" not in checkpoints  # a part may take days
    assert arguments["resume"] == str(finished.run(training.name)) and arguments["options"] == {"accelerator": "cpu"}


def test_a_result_that_is_none_is_named(whole, finished):
    job = whole.trials[0].final[50]
    finished.path("done", f"{job.name}.json").write_text("{}")
    with pytest.raises(UserError, match=f"{job.name}.json: is no result of a job"):
        write_report(whole, finished)
