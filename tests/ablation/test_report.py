"""The report has the numbers of the results, and what is not there yet is left out."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.ablation.report import report_folder, write_report
from ldm.ablation.resolve import Resolved, resolve
from ldm.ablation.run import first_stage_evaluation, sample_evaluations, step_names, steps_of_a_part, with_length
from ldm.ablation.study import Study, read
from ldm.ablation.tables import STEPS, Results, over_seeds
from ldm.ablation.workspace import Workspace
from ldm.errors import UserError
from ldm.evaluation.report import Panel, plot_panels, pyplot

STUDY = Path(__file__).resolve().parents[2] / "configs" / "ablation" / "toy_f.yaml"
FRECHET = {4: {1: 40.0, 2: 30.0}, 8: {1: 20.0, 2: 10.0}}  # by f and seed
SECONDS_OF_A_STEP = 0.5
STEPS_OF_A_TRAINING = int(4 * 60 / SECONDS_OF_A_STEP)  # in four minutes


@pytest.fixture(scope="module")
def study() -> Study:
    study = read(STUDY)
    return replace(study, axes={"f": {f: study.axes["f"][f] for f in FRECHET}}, seeds=(1, 2))


@pytest.fixture(scope="module")
def trials(study) -> list[Resolved]:
    return resolve(study)


def finish(name: str, workspace: Workspace, result: dict[str, Any], seconds: float | None = 60.0) -> None:
    path = workspace.path("done", f"{name}.json")
    path.write_text(json.dumps({"seconds": seconds, "result": result}))


def evaluated(name: str, workspace: Workspace, values: dict[str, float], seconds: float | None = 60.0) -> None:
    """Leave what an evaluation leaves."""
    folder = workspace.path("evaluations", name)
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    finish(name, workspace, {"values": values, "n": 500, "made": {"draw_seconds": 10.0}}, seconds)


@pytest.fixture
def finished(study, trials, tmp_path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.create()
    trained = {"steps": STEPS_OF_A_TRAINING, "seconds_per_step": SECONDS_OF_A_STEP}
    for trial in trials:
        for name in step_names(study, trial):
            finish(name, workspace, trained)
        value = FRECHET[trial.trial.labels["f"]][trial.trial.seed]
        evaluated(first_stage_evaluation(study, trial).name, workspace, {"psnr": 30.0, "psnr_std": 2.0})
        for evaluation in sample_evaluations(study, trial):
            evaluated(evaluation.name, workspace, {"frechet[scenenet]": value})
    return workspace


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_images_and_numbers_of_a_finished_study(study, trials, finished):
    page = write_report(study, trials, finished)
    files = {path.name for path in page.parent.iterdir()}
    images = {"progress.png", "throughput.png", "axis_f.png"}
    assert files == images | {"report.html", "trials.csv", "first_stages.csv", "progress.csv", "throughput.csv"}
    text = page.read_text()
    assert "http" not in text and text.count("data:image/png") == len(images) + 2 * 2  # and two sheets for each f
    assert "frechet[scenenet], from low to high (less is better): f=8 (15), f=4 (35)." in text
    assert "35 ± 5" in text and "30 ± 2" in text


def test_progress_counts_what_was_trained(study, trials, finished):
    page = write_report(study, trials, finished)
    found = [row for row in rows(page.parent / "progress.csv") if row["f"] == "4" and row["seed"] == "1"]
    steps = STEPS_OF_A_TRAINING // 4
    assert [int(row["step"]) for row in found] == [steps, 2 * steps, 3 * steps, 4 * steps]
    assert [float(row["minutes"]) for row in found] == pytest.approx([1.0, 2.0, 3.0, 4.0])
    assert [int(row["samples"]) for row in found] == [32 * int(row["step"]) for row in found]


def test_lines_of_progress_go_through_the_mean_of_seeds_of_another_speed(study, trials, finished):
    other = next(trial for trial in trials if trial.trial.seed == 2)
    result = finished.result(other.name)
    steps = result["steps"]
    finish(other.name, finished, {**result, "steps": 2 * steps})  # its machine was twice as fast
    curve = study.evaluation.curve_steps
    found = [row for row in Results(study, trials, finished).evaluations() if row[STEPS] == curve]
    means = [row for row in over_seeds(found, ["f", "part"]) if row["f"] == other.trial.labels["f"]]
    assert [row["part"] for row in means] == [1, 2, 3, 4]
    assert [row["step"] for row in means] == [1.5 * steps * part / 4 for part in (1, 2, 3, 4)]
    assert [row["samples"] for row in means] == [32 * row["step"] for row in means]
    assert f"{round(1.5 * steps)} ± {steps // 2}" in write_report(study, trials, finished).read_text()


def test_speed_is_that_of_drawing_also_where_an_evaluation_was_interrupted(study, trials, finished):
    first = trials[0]
    evaluated(sample_evaluations(study, first)[-1].name, finished, {"frechet[scenenet]": 1.0}, seconds=None)
    found = Results(study, trials, finished).evaluations()
    assert all(row["samples/s"] == 50.0 for row in found)
    costs = {row[STEPS]: row["GFLOP a sample"] for row in found if row["f"] == first.trial.labels["f"]}
    assert costs[50] == pytest.approx((50 * first.cost.network_flops + first.cost.decoder_flops) / 1e9)


def test_a_study_under_way_is_reported_as_far_as_it_is(study, trials, tmp_path):
    page = write_report(study, trials, Workspace(tmp_path))
    assert "1,856,579" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "trials.csv"}


def test_other_seeds_and_another_study_have_a_report_of_their_own(study, tmp_path):
    studies = [study, replace(study, seeds=(3,)), replace(study, title="another")]
    assert len({report_folder(one, Workspace(tmp_path)) for one in studies}) == 3


def test_trials_that_differ_in_sampling_alone_have_figures_of_their_own(tmp_path):
    study = read(STUDY.with_name("guidance.yaml"))
    trials, workspace = resolve(study), Workspace(tmp_path)
    workspace.create()
    for number, trial in enumerate(trials):
        finish(trial.name, workspace, {"steps": 3200, "seconds_per_step": 1.0})
        for evaluation in sample_evaluations(study, trial):
            evaluated(evaluation.name, workspace, {"frechet[scenenet]": 10.0 + number})
    page = write_report(study, trials, workspace)
    assert [float(row["frechet[scenenet]"]) for row in rows(page.parent / "trials.csv")] == [10, 11, 12, 13, 14, 15]


def test_the_ticks_of_a_logarithmic_axis_are_its_few_values(tmp_path, monkeypatch):
    figures, plt = [], pyplot()
    monkeypatch.setattr(plt, "close", figures.append)
    points = [(0.02, 1.0), (0.05, 2.0), (0.25, 3.0)]
    plot_panels([Panel("length", "frechet", {"all": points})], tmp_path / "axis.png")
    (axis,) = figures[0].axes
    assert axis.get_xscale() == "log" and [tick.get_text() for tick in axis.get_xticklabels()] == [
        "0.02",
        "0.05",
        "0.25",
    ]
    assert not axis.get_xticks(minor=True).size


def test_many_trials_are_shown_in_panels_and_compared_with_what_papers_say(tmp_path):
    objectives = read(STUDY.with_name("objectives.yaml"))
    study = replace(objectives, seeds=(1, 2), evaluation=replace(objectives.evaluation, steps=(5, 10)))
    trials, workspace = resolve(study), Workspace(tmp_path)
    workspace.create()
    for trial in trials:
        finish(trial.name, workspace, {"steps": study.budget.steps, "seconds_per_step": 1.0})
        value = 5.0 if trial.trial.labels["weighting"] == "min-SNR" else 9.0
        for evaluation in sample_evaluations(study, trial):
            evaluated(evaluation.name, workspace, {"frechet[scenenet]": value + trial.trial.seed})
    page = write_report(study, trials, workspace)
    with Image.open(page.parent / "throughput.png") as image:
        assert image.size == (2 * 400, 2 * 288)  # a panel for each weighting and density, not one of twelve lines
    seen = {row["claim"]: row["here"] for row in rows(page.parent / "claims.csv")}
    assert [here for says, here in seen.items() if "min-SNR" in says] == ["shown"]
    assert list(seen.values()).count("not shown at this size") == 2


def test_a_training_has_the_length_of_its_budget_and_keeps_a_checkpoint_of_each_part(study, trials):
    steps = steps_of_a_part(study, trials[0].content, SECONDS_OF_A_STEP)
    assert steps == STEPS_OF_A_TRAINING // 4
    lightning = with_length(trials[0].content, 4, steps)["lightning"]
    checkpoints = lightning["modelcheckpoint"]["params"]
    assert lightning["trainer"]["max_steps"] == 4 * checkpoints["keep_every_n_steps"] == STEPS_OF_A_TRAINING
    assert "every_n_steps" not in checkpoints  # a part may take days
    of_samples = replace(study, budget=replace(study.budget, minutes=None, samples=6400))
    assert steps_of_a_part(of_samples, trials[0].content) == 6400 // 32 // 4


def test_a_result_that_is_none_is_named(study, trials, finished):
    name = sample_evaluations(study, trials[0])[-1].name
    finished.path("done", f"{name}.json").write_text("{}")
    with pytest.raises(UserError, match=f"{name}.json: is no result of a step"):
        write_report(study, trials, finished)
