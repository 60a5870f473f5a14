"""The report of a study: figures 6 and 7 and table 8 of the paper for it, as plots, CSV and one page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ldm.ablation import tables
from ldm.ablation.plan import StudyPlan, TrialJobs
from ldm.ablation.tables import Row
from ldm.ablation.workspace import Workspace
from ldm.config.types import fits
from ldm.evaluation.report import Panel, Section, plot_panels, write_page

_COSTS = ("samples", "training PFLOP", "minutes")
_IS_DISTANCE = ("frechet", "spatial_frechet", "kernel", "lpips")


def report_folder(plan: StudyPlan, workspace: Workspace) -> Path:
    """Return the folder of the report: one for each content of the study and list of seeds, so none is overwritten."""
    study = asdict(plan.study)
    study["axes"] = [[name, list(map(str, axis.items()))] for name, axis in plan.study.axes.items()]
    digest = hashlib.sha256(json.dumps(study, default=str, sort_keys=True).encode()).hexdigest()[:8]
    return workspace.folder / f"report-seeds{'_'.join(map(str, plan.study.seeds))}-{digest}"


def write_report(plan: StudyPlan, workspace: Workspace) -> Path:
    """Write what is known so far; return the page."""
    folder = report_folder(plan, workspace)
    folder.mkdir(parents=True, exist_ok=True)
    figures, final = tables.figures(plan, workspace), tables.throughput(plan, workspace)
    shown = [
        _overview(plan, tables.trials(plan, workspace), figures, folder),
        _first_stages(tables.first_stages(plan, workspace), folder),
        _progress(plan, tables.progress(plan, workspace), figures, folder),
        _throughput(plan, final, figures, folder),
        *_axes(plan, final, figures, folder),
        *_images(plan, workspace),
    ]
    page = folder / "report.html"
    write_page(page, plan.study.title, [section for section in shown if section is not None])
    return page


def _overview(plan: StudyPlan, rows: list[Row], figures: list[str], folder: Path) -> Section:
    tables.write_csv(rows, folder / "trials.csv")
    spec = plan.study.evaluation
    text = (
        f"{plan.study.text}\n\nEqual for all latent trainings: {plan.study.budget.amount:g} {plan.study.budget.kind}. "
        f"Evaluated by {spec.num_samples} samples of {spec.curve_steps} DDIM steps and features of "
        f"{spec.extractor}; over seeds {', '.join(map(str, plan.study.seeds))}: mean ± deviation. FLOPs are "
        f"those of one image; a training step counts three forward passes.\n\n{verdict(plan, rows, figures)}"
    )
    return Section("Trials", text, tables.as_text(tables.over_seeds(rows, list(plan.study.axes), deviations=True)))


def verdict(plan: StudyPlan, rows: Sequence[Row], figures: Sequence[str]) -> str:
    """Return the order of the trials by each metric."""
    sentences = []
    for name in figures:
        means = [row for row in tables.over_seeds(rows, list(plan.study.axes)) if name in row]
        means.sort(key=lambda row: row[name])
        order = ", ".join(f"{_label(plan, row)} ({row[name]:.4g})" for row in means)
        side = "less is better" if name.split("[")[0] in _IS_DISTANCE else "more is better"
        sentences.append(f"{name}, from low to high ({side}): {order}.")
    return " ".join(sentences)


def _label(plan: StudyPlan, row: Row, without: str = "") -> str:
    return ", ".join(f"{name}={row[name]}" for name in plan.study.axes if name != without) or "all"


def _first_stages(rows: list[Row], folder: Path) -> Section | None:
    if not rows:
        return None
    tables.write_csv(rows, folder / "first_stages.csv")
    shown = [_with_deviations(row) for row in rows]
    text = "Reconstructions of the latent models' validation set."
    return Section("First stages (Table 8)", text, tables.as_text(shown))


def _with_deviations(row: Row) -> Row:
    """Write mean and deviation in one cell."""
    return {
        name: f"{value:.4g} ± {row[name + tables.DEVIATION]:.2g}" if name + tables.DEVIATION in row else value
        for name, value in row.items()
        if not name.endswith(tables.DEVIATION)
    }


def _progress(plan: StudyPlan, rows: list[Row], figures: list[str], folder: Path) -> Section | None:
    if not rows or plan.study.budget.points == 1:
        return None
    tables.write_csv(rows, folder / "progress.csv")
    means = tables.over_seeds(rows, [*plan.study.axes, "part"])  # the speed, and so the steps, may differ by seed
    costs = [cost for cost in _COSTS if cost in rows[0]]
    panels = [_panel(plan, means, cost, figure) for figure in figures for cost in costs]
    plot_panels(panels, folder / "progress.png", columns=len(costs))
    return Section("Progress of training (Figures 6, 17)", images=[folder / "progress.png"])


def _panel(plan: StudyPlan, rows: Sequence[Row], x: str, y: str, without: str = "") -> Panel:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if x in row and y in row:
            lines.setdefault(_label(plan, row, without), []).append((row[x], row[y]))
    return Panel(x, y, lines)


def _throughput(plan: StudyPlan, rows: list[Row], figures: list[str], folder: Path) -> Section | None:
    if not rows or len(plan.study.evaluation.steps) == 1:
        return None
    tables.write_csv(rows, folder / "throughput.csv")
    timed = tables.over_seeds(rows, [*plan.study.axes, "sampling steps"])
    panels = [_panel(plan, timed, cost, figure) for figure in figures for cost in ("samples/s", "GFLOP a sample")]
    plot_panels(panels, folder / "throughput.png")
    steps = ", ".join(str(steps) for steps in sorted({row["sampling steps"] for row in rows}))
    text = (
        f"DDIM with {steps} steps: more steps, fewer samples a second. Time is that of sampling and decoding, on the "
        "machine of the study, where several jobs may share it; FLOPs are those of all steps and of decoding."
    )
    table = tables.as_text(tables.over_seeds(rows, [*plan.study.axes, "sampling steps"], deviations=True))
    return Section("Quality against throughput (Figure 7)", text, table, [folder / "throughput.png"])


def _axes(plan: StudyPlan, rows: list[Row], figures: list[str], folder: Path) -> list[Section]:
    """Plot each metric against each axis of numbers, at the end of training."""
    at = [row for row in rows if row["sampling steps"] == plan.study.evaluation.curve_steps]
    means = tables.over_seeds(at, list(plan.study.axes))
    sections = []
    for axis, values in plan.study.axes.items():
        if means and len(values) > 1 and all(fits(value, float) for value in values):
            path = folder / f"axis_{axis}.png"
            panels = [_panel(plan, means, axis, figure, without=axis) for figure in figures]
            plot_panels(panels, path, columns=3)
            sections.append(Section(f"Against {axis}", images=[path]))
    return sections


def _images(plan: StudyPlan, workspace: Workspace) -> list[Section]:
    """Show samples of the first seed, and reconstructions by the first stages."""
    return [
        Section(f"{trial.resolved.trial}: {what}", images=[sheet])
        for trial in plan.trials
        if trial.resolved.trial.seed == plan.study.seeds[0]
        for what, sheet in _sheets(plan, trial, workspace)
    ]


def _sheets(plan: StudyPlan, trial: TrialJobs, workspace: Workspace) -> list[tuple[str, Path]]:
    jobs = {"first stage": trial.first_stage, "samples": trial.final[plan.study.evaluation.curve_steps]}
    names = {what: job.name for what, job in jobs.items() if job is not None}
    sheets = {what: workspace.path("evaluations", name) / "samples.png" for what, name in names.items()}
    return [(what, sheet) for what, sheet in sheets.items() if sheet.is_file()]
