"""The numbers of a study as rows: column -> value. What is not finished is left out."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

from ldm.ablation.resolve import Resolved
from ldm.ablation.run import Evaluation, first_stage_evaluation, sample_evaluations, speed_name
from ldm.ablation.study import Study
from ldm.ablation.workspace import Workspace

Row = dict[str, Any]
STEPS, EVALUATIONS = "sampling steps", "network evaluations"
TRAINING = ("samples", "training PFLOP", "minutes")  # columns of costs
SAMPLING = (EVALUATIONS, "samples/s", "GFLOP a sample")
DEVIATION, INTERVAL = "_std", "_ci95"
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% quantiles of Student's t, 1 to 9 degrees
_TRAINING_PASSES = 3  # a backward pass costs about two forward passes
_GIGA, _PETA = 1e9, 1e15
_DISTANCES = ("frechet", "spatial_frechet", "memorisation_frechet", "kernel", "mmd", "lpips")


@dataclass(frozen=True)
class Results:
    """What is known of a study so far."""

    study: Study
    trials: Sequence[Resolved]
    workspace: Workspace

    def first_stages(self) -> list[Row]:
        """Return Table 8: a row for each first stage, trained or given."""
        rows = {}
        for trial in self.trials:
            evaluation, stage = first_stage_evaluation(self.study, trial), trial.first_stage
            if evaluation is not None and self.workspace.is_done(evaluation.name):
                node = stage.content["model"]["params"]
                regularizer = node["regularizer"]
                codes = regularizer.get("params", {}).get("num_codes", regularizer["target"].rpartition(".")[2])
                row = {"f": trial.cost.factor, "|Z|": codes, "c": node["embed_dim"]}
                row |= self.workspace.result(evaluation.name)["values"]
                row |= {} if stage.checkpoint is not None else self._minutes(stage.name)
                rows[evaluation.name] = {**row, "name": stage.name}
        return sorted(rows.values(), key=lambda row: row["f"])

    def overview(self) -> list[Row]:
        """Return a row for each trial, trained or not: its size, its cost, and how good it is at the end."""
        at = (self.study.budget.points, self.study.evaluation.curve_steps)
        done = (each for each in self._samples() if (each[1].part, each[1].steps) == at)
        final = {str(labels(trial)): found["values"] for trial, _, found in done}
        rows = []
        for trial in self.trials:
            row, name = size(trial), trial.name
            if self.workspace.is_done(name):
                steps = self.workspace.result(name)["steps"]
                row |= {"steps": steps, **self._cost(trial, steps), **self._minutes(name)}
            rows.append(row | final.get(str(labels(trial)), {}))
        return rows

    def evaluations(self) -> list[Row]:
        """Return a row for each evaluation of samples: how good, after what training, sampled at what cost."""
        rows = []
        for trial, evaluation, found in self._samples():
            row: Row = {**labels(trial), "part": evaluation.part}
            if trial.checkpoint is None:
                step = self.workspace.result(trial.name)["steps"] * evaluation.part // self.study.budget.points
                row |= {"step": step, **self._cost(trial, step)}
            before_they_were_counted = evaluation.steps * (1 if trial.sampling.scale == 1 else 2)
            passes = found.get("evaluations_per_image", before_they_were_counted)
            flops = passes * trial.cost.network_flops + trial.cost.decoder_flops
            speed = found["n"] / found["made"]["draw_seconds"]
            row |= {STEPS: evaluation.steps, EVALUATIONS: passes, "samples/s": speed}
            rows.append(row | {"GFLOP a sample": flops / _GIGA} | found["values"])
        return rows

    def metrics(self) -> list[str]:
        """Return the names of the metrics of samples, without deviations."""
        names = dict.fromkeys(name for *_, found in self._samples() for name in found["values"])
        return [name for name in names if DEVIATION not in name]

    def _samples(self) -> Iterator[tuple[Resolved, Evaluation, dict[str, Any]]]:
        """Yield the finished evaluations of samples, each with its result."""
        for trial in self.trials:
            for evaluation in sample_evaluations(self.study, trial):
                if self.workspace.is_done(evaluation.name):
                    yield trial, evaluation, self.workspace.result(evaluation.name)

    def _cost(self, trial: Resolved, steps: int) -> Row:
        samples = steps * trial.cost.global_batch
        row: Row = {"samples": samples}
        row["training PFLOP"] = _TRAINING_PASSES * samples * trial.cost.network_flops / _PETA
        if (speed := speed_name(self.study, trial)) is not None:
            row["minutes"] = steps * self.workspace.result(speed)["seconds_per_step"] / 60
        return row

    def _minutes(self, name: str) -> Row:
        seconds = self.workspace.seconds(name)
        return {} if seconds is None else {"training minutes": seconds / 60}


def labels(trial: Resolved) -> Row:
    """Return the values of the axes, and the seed."""
    return {**trial.trial.labels, "seed": trial.trial.seed}


def size(trial: Resolved) -> Row:
    """Return what is known of a trial before anything is trained."""
    cost = trial.cost
    row: Row = {**labels(trial), "latent": "x".join(map(str, cost.latent_shape)), "parameters": cost.parameters}
    row |= {"GFLOP a forward pass": cost.network_flops / _GIGA, "GFLOP a decoding": cost.decoder_flops / _GIGA}
    return row | {"batch": cost.global_batch, "learning rate": cost.learning_rate}


def over_seeds(rows: Sequence[Row], by: Sequence[str], deviations: bool = False) -> list[Row]:
    """Average rows that agree in the columns `by` over the seeds.

    deviations: whether they are added, as text; otherwise NAME_ci95 has half the 95% interval of each mean.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(name) for name in by)].append(row)
    return [_averaged(group, deviations) for group in groups.values()]


def _averaged(rows: Sequence[Row], deviations: bool) -> Row:
    averaged: Row = {}
    for name in columns(rows):
        values = [row[name] for row in rows if name in row]
        if name == "seed":
            continue
        if len(set(values)) == 1 or any(isinstance(value, str) for value in values):
            averaged[name] = values[0]
        elif not deviations:
            averaged |= {name: fmean(values), name + INTERVAL: half_width(values)}
        elif all(isinstance(value, int) for value in values):  # counts: of steps, of samples
            averaged[name] = f"{_text(round(fmean(values)))} ± {_text(round(pstdev(values)))}"
        else:
            averaged[name] = with_deviation(fmean(values), pstdev(values))
    return averaged


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95% confidence interval of the mean of two values or more, by Student's t."""
    degrees = len(values) - 1
    t = _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.6 / degrees
    return t * stdev(values) / math.sqrt(len(values))


def less_is_better(metric: str) -> bool:
    """Return whether a metric, with or without its extractor, is a distance."""
    return metric.split("[")[0] in _DISTANCES


def with_deviation(mean: float, deviation: float) -> str:
    """Write a mean with its deviation."""
    return f"{mean:.4g} ± {deviation:.2g}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows with all columns that any of them has."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)


def columns(rows: Iterable[Row]) -> list[str]:
    """List the columns of rows in the order in which they first occur."""
    return list(dict.fromkeys(name for row in rows for name in row))


def without(rows: Iterable[Row], *names: str) -> list[Row]:
    """Return rows without some of their columns."""
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def as_text(rows: Sequence[Row]) -> list[list[str]]:
    """Turn rows into a table for a page, header first."""
    names = columns(rows)
    return [names, *([_text(row.get(name, "")) for name in names] for row in rows)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
