"""The numbers of a study as rows, from the results of its jobs; what is not there yet is left out."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from ldm.ablation.jobs import Evaluation
from ldm.ablation.plan import StudyPlan, TrialJobs
from ldm.ablation.workspace import Workspace

Row = dict[str, Any]
_TRAINING_PASSES = 3  # a backward pass costs about two forward passes
DEVIATION = "_std"
_GIGA, _PETA = 1e9, 1e15


def result(workspace: Workspace, job: Evaluation | None) -> dict[str, Any] | None:
    """Return the content of evaluation.json, None as long as the evaluation is not finished."""
    return None if job is None or not workspace.is_done(job.name) else workspace.result(job.name)


def first_stages(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return Table 8: a row for each first stage, trained or given."""
    rows = {}
    for trial in plan.trials:
        found = result(workspace, trial.first_stage)
        if found is not None:
            node = trial.resolved.first_stage.content["model"]["params"]
            regularizer = node["regularizer"]
            codes = regularizer.get("params", {}).get("num_codes", regularizer["target"].rpartition(".")[2])
            name, is_trained = trial.resolved.first_stage.name, trial.resolved.first_stage.checkpoint is None
            minutes = _timed("training minutes", workspace.seconds(name) if is_trained else None, 60)
            shape = {"f": trial.resolved.cost.factor, "|Z|": codes, "c": node["embed_dim"]}
            rows[trial.first_stage.name] = {**shape, **found["values"], **minutes, "name": name}
    return sorted(rows.values(), key=lambda row: row["f"])


def sizes(plan: StudyPlan) -> list[Row]:
    """Return a row for each trial: what is known before anything is trained."""
    return [_size(trial) for trial in plan.trials]


def _size(trial: TrialJobs) -> Row:
    cost = trial.resolved.cost
    row: Row = {**_labels(trial), "latent": "x".join(map(str, cost.latent_shape)), "U-Net": cost.parameters}
    row |= {"GFLOP a forward pass": cost.network_flops / _GIGA, "GFLOP a decoding": cost.decoder_flops / _GIGA}
    return row | {"batch": cost.global_batch, "learning rate": cost.learning_rate}


def trials(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return a row for each trial, trained or not: its size, its cost, and how it was evaluated at the end."""
    return [_trial(plan, trial, workspace) for trial in plan.trials]


def _trial(plan: StudyPlan, trial: TrialJobs, workspace: Workspace) -> Row:
    row = _size(trial)
    if workspace.is_done(trial.training.name):
        steps = workspace.result(trial.training.name)["steps"]
        row |= {"steps": steps, **_cost(trial, steps, workspace)}
        row |= _timed("training minutes", workspace.seconds(trial.training.name), 60)
    found = result(workspace, trial.final[plan.study.evaluation.curve_steps])
    return row if found is None else {**row, **found["values"]}


def _labels(trial: TrialJobs) -> Row:
    return {**trial.resolved.trial.labels, "seed": trial.resolved.trial.seed}


def _cost(trial: TrialJobs, steps: int, workspace: Workspace) -> Row:
    cost = trial.resolved.cost
    samples = steps * cost.global_batch
    row = {"samples": samples, "training PFLOP": _TRAINING_PASSES * samples * cost.network_flops / _PETA}
    if trial.speed is not None:
        row["minutes"] = steps * workspace.result(trial.speed.name)["seconds_per_step"] / 60
    return row


def _timed(name: str, seconds: float | None, unit: float) -> Row:
    return {} if seconds is None else {name: seconds / unit}


def figures(plan: StudyPlan, workspace: Workspace) -> list[str]:
    """Return the names of the metrics at the end of trainings, without deviations."""
    found = [result(workspace, job) for trial in plan.trials for job in trial.final.values()]
    names = [name for one in found if one is not None for name in one["values"]]
    return [name for name in dict.fromkeys(names) if DEVIATION not in name]


def progress(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return Figure 6: how good every trial is along its training; `part` counts those of the budget."""
    rows = []
    for trial in plan.trials:
        for part, job in enumerate((*trial.curve, trial.final[plan.study.evaluation.curve_steps]), start=1):
            found = result(workspace, job)
            if found is not None:
                step = job.step(workspace)
                cost = _cost(trial, step, workspace)
                rows.append({**_labels(trial), "part": part, "step": step, **cost, **found["values"]})
    return rows


def throughput(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return Figure 7: how good and how fast every trial is at the end, for several numbers of steps."""
    rows = []
    for trial in plan.trials:
        for steps, job in trial.final.items():
            found = result(workspace, job)
            if found is not None:
                rate = found["n"] / found["made"]["draw_seconds"]
                cost = {"samples/s": rate, "GFLOP a sample": _sample_cost(trial, steps)}
                rows.append({**_labels(trial), "sampling steps": steps, **cost, **found["values"]})
    return rows


def _sample_cost(trial: TrialJobs, steps: int) -> float:
    """Return the GFLOP of one decoded sample; guidance runs the network twice a step."""
    cost = trial.resolved.cost
    passes = steps * (1 if trial.resolved.trial.variant.sampling.scale == 1 else 2)
    return (passes * cost.network_flops + cost.decoder_flops) / _GIGA


def over_seeds(rows: Sequence[Row], by: Sequence[str], deviations: bool = False) -> list[Row]:
    """Average rows that agree in the columns `by` over the seeds; with `deviations` as text where there are several."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(name) for name in by)].append(row)
    return [_averaged(group, deviations) for group in groups.values()]


def _averaged(rows: Sequence[Row], deviations: bool) -> Row:
    averaged: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "seed"):
        values = [row[name] for row in rows if name in row]
        if len(set(values)) == 1 or any(isinstance(value, str) for value in values):
            averaged[name] = values[0]
        elif deviations:
            averaged[name] = _with_deviation(values)
        else:
            averaged[name] = fmean(values)
    return averaged


def _with_deviation(values: Sequence[float]) -> str:
    mean, deviation = fmean(values), pstdev(values)
    if all(isinstance(value, int) for value in values):  # counts: of steps, of samples
        return f"{_text(round(mean))} ± {_text(round(deviation))}"
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


def as_text(rows: Sequence[Row]) -> list[list[str]]:
    """Turn rows into a table for a page, header first."""
    names = columns(rows)
    return [names, *([_text(row.get(name, "")) for name in names] for row in rows)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
