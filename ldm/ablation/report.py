"""The report of a study: figures 6 and 7 and table 8 of the paper for it, as plots, CSV and one page."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from ldm.ablation.claims import verdicts
from ldm.ablation.resolve import Resolved
from ldm.ablation.run import first_stage_evaluation, sample_evaluations
from ldm.ablation.study import Study
from ldm.ablation.tables import (
    DEVIATION,
    INTERVAL,
    SAMPLING,
    STEPS,
    TRAINING,
    Results,
    Row,
    as_text,
    less_is_better,
    over_seeds,
    with_deviation,
    without,
    write_csv,
)
from ldm.ablation.workspace import Workspace, file_name
from ldm.config.types import fits
from ldm.evaluation.report import Panel, Section, plot_panels, write_page

_MOST_LINES = 10  # in a panel; above it there is one for each combination of the other axes


def report_folder(study: Study, workspace: Workspace) -> Path:
    """Return the folder of the report: one for each content of the study and list of seeds, so none is overwritten."""
    content = asdict(study)
    content["axes"] = [[name, list(map(str, axis.items()))] for name, axis in study.axes.items()]
    digest = hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()[:8]
    return workspace.folder / f"report-seeds{file_name('_'.join(map(str, study.seeds)))}-{digest}"


def write_report(study: Study, trials: Sequence[Resolved], workspace: Workspace) -> Path:
    """Write what is known so far; return the page."""
    folder, results = report_folder(study, workspace), Results(study, trials, workspace)
    folder.mkdir(parents=True, exist_ok=True)
    sections = list(_Report(results, results.evaluations(), results.metrics(), folder).sections())
    write_page(folder / "report.html", study.title, sections)
    return folder / "report.html"


@dataclass(frozen=True)
class _Report:
    """The sections of a page from the rows of all evaluations."""

    results: Results
    rows: Sequence[Row]
    metrics: Sequence[str]
    folder: Path

    @property
    def study(self) -> Study:
        return self.results.study

    def sections(self) -> Iterator[Section]:
        yield self._overview()
        final = [row for row in self.rows if row["part"] == self.study.budget.points]
        if self.study.claims:
            yield self._claims(final)
        if first_stages := self.results.first_stages():
            yield self._first_stages(first_stages)
        last, steps = self.study.budget.points, self.study.evaluation.curve_steps
        progress = [row for row in self.rows if row[STEPS] == steps]
        if progress and last > 1:
            yield self._progress(without(progress, STEPS, *SAMPLING))
        if final and len(self.study.evaluation.steps) > 1:
            yield self._throughput(without(final, "part", "step", *TRAINING))
        yield from self._axes([row for row in final if row[STEPS] == steps])
        yield from self._images()

    def _overview(self) -> Section:
        rows, spec = self.results.overview(), self.study.evaluation
        write_csv(rows, self.folder / "trials.csv")
        text = (
            f"{self.study.text}\n\n{self._equal()} Evaluated by "
            f"{spec.num_samples} samples of {spec.curve_steps} steps and features of {spec.extractor}; over seeds "
            f"{', '.join(map(str, self.study.seeds))}: mean ± deviation; bars are 95% intervals of the mean. "
            f"FLOPs are those of one image; a training step counts three forward passes.\n\n{self._verdict(rows)}"
        )
        return Section("Trials", text, as_text(over_seeds(rows, list(self.study.axes), deviations=True)))

    def _equal(self) -> str:
        """Return what was the same for all trials."""
        given = sorted({trial.checkpoint for trial in self.results.trials if trial.checkpoint is not None})
        if given:
            return f"Trained before: {', '.join(given)}; a seed is that of the samples."
        return f"Equal for all latent trainings: {self.study.budget.amount:g} {self.study.budget.kind}."

    def _claims(self, rows: list[Row]) -> Section:
        found = verdicts(self.study.claims, rows, self.study.evaluation.curve_steps)
        write_csv(found, self.folder / "claims.csv")
        text = (
            "Differences between trials of the same seed, positive where what is said to be better is. Shown: the 95% "
            "interval of the mean over the seeds leaves out zero. What is not shown here may hold at another size."
        )
        return Section("What papers say, and what is seen here", text, as_text(found))

    def _verdict(self, rows: Sequence[Row]) -> str:
        """Return the order of the trials by each metric."""
        sentences = []
        for name in self.metrics:
            means = [row for row in over_seeds(rows, list(self.study.axes)) if name in row]
            means.sort(key=lambda row: row[name])
            order = ", ".join(f"{_label(row, self.study.axes)} ({row[name]:.4g})" for row in means)
            side = "less is better" if less_is_better(name) else "more is better"
            sentences.append(f"{name}, from low to high ({side}): {order}.")
        return " ".join(sentences)

    def _first_stages(self, rows: list[Row]) -> Section:
        write_csv(rows, self.folder / "first_stages.csv")
        shown = []
        for row in rows:
            deviations = {name: row[name + DEVIATION] for name in row if name + DEVIATION in row}
            joined = {name: with_deviation(row[name], value) for name, value in deviations.items()}
            shown += without([row | joined], *(name + DEVIATION for name in deviations))
        text = "Reconstructions of the latent models' validation set."
        return Section("First stages (Table 8)", text, as_text(shown))

    def _progress(self, rows: list[Row]) -> Section:
        write_csv(rows, self.folder / "progress.csv")
        means = over_seeds(rows, [*self.study.axes, "part"])  # the speed, and so the steps, may differ by seed
        costs = [cost for cost in TRAINING if cost in rows[0]]
        image = self._plot("progress.png", means, costs, columns=len(costs))
        return Section("Progress of training (Figures 6, 17)", images=[image])

    def _throughput(self, rows: list[Row]) -> Section:
        write_csv(rows, self.folder / "throughput.csv")
        by = [*self.study.axes, STEPS]
        image = self._plot("throughput.png", over_seeds(rows, by), SAMPLING, columns=len(SAMPLING))
        steps = ", ".join(str(steps) for steps in sorted({row[STEPS] for row in rows}))
        text = (
            f"Samplers with {steps} steps: more steps, fewer samples a second. A network evaluation is one pass of one "
            "image; guided steps take two, as do those of Heun. Time is that of sampling and decoding, on the machine "
            "of the study, where several jobs may share it; FLOPs are those of all steps and of decoding."
        )
        return Section("Quality against throughput (Figure 7)", text, as_text(over_seeds(rows, by, True)), [image])

    def _axes(self, rows: list[Row]) -> Iterator[Section]:
        """Plot each metric against each axis of numbers, at the end of training."""
        means = over_seeds(rows, list(self.study.axes))
        for axis, values in self.study.axes.items():
            if means and len(values) > 1 and all(fits(value, float) for value in values):
                image = self._plot(f"axis_{file_name(axis)}.png", means, [axis], columns=3, without=axis)
                yield Section(f"Against {axis}", images=[image])

    def _plot(self, name: str, rows: Sequence[Row], costs: Sequence[str], columns: int, without: str = "") -> Path:
        """Plot each metric against each of the costs, a line for each trial.

        Where those would be too many, lines are values of the longest axis, and panels those of the others.
        """
        axes = [axis for axis in self.study.axes if axis != without]
        parts: dict[str, list[Row]] = {"": list(rows)}
        if math.prod(len(self.study.axes[axis]) for axis in axes) > _MOST_LINES and len(axes) > 1:
            longest = max(axes, key=lambda axis: len(self.study.axes[axis]))
            axes, others, costs = [longest], [axis for axis in axes if axis != longest], costs[:1]
            parts = defaultdict(list)
            for row in rows:
                parts[_label(row, others)].append(row)
            columns = math.prod(len(self.study.axes[axis]) for axis in others[1:]) if len(others) > 1 else len(parts)
        found = product(self.metrics, parts.items(), costs)
        panels = [_panel(part, cost, metric, axes, title) for metric, (title, part), cost in found]
        plot_panels(panels, self.folder / name, columns)
        return self.folder / name

    def _images(self) -> Iterator[Section]:
        """Show samples of the first seed, and reconstructions by the first stages."""
        study, at = self.study, (self.study.budget.points, self.study.evaluation.curve_steps)
        for trial in self.results.trials:
            if trial.trial.seed == study.seeds[0]:
                final = next(one for one in sample_evaluations(study, trial) if (one.part, one.steps) == at)
                shown = {"first stage": first_stage_evaluation(study, trial), "samples": final}
                for what, evaluation in shown.items():
                    if evaluation is not None:
                        sheet = self.results.workspace.path("evaluations", evaluation.name) / "samples.png"
                        if sheet.is_file():
                            yield Section(f"{trial.trial}: {what}", images=[sheet])


def _label(row: Row, axes: Iterable[str]) -> str:
    return ", ".join(f"{axis}={row[axis]}" for axis in axes) or "all"


def _panel(rows: Sequence[Row], cost: str, metric: str, axes: Sequence[str], title: str) -> Panel:
    """Return a panel of a metric against a cost, with a line for each trial and bars for its seeds."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    bars: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if cost in row and metric in row:
            lines[_label(row, axes)].append((row[cost], row[metric]))
            bars[_label(row, axes)].append(row.get(metric + INTERVAL, 0.0))
    return Panel(cost, metric, lines, title, {label: halves for label, halves in bars.items() if any(halves)})
