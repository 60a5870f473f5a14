"""The numbers of a study as rows, from the results of its jobs; what is not there yet is left out."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from ldm.ablation.jobs import Evaluation
from ldm.ablation.outcomes import Outcome, read
from ldm.ablation.plan import Entry, StudyPlan
from ldm.ablation.workspace import Workspace

Row = dict[str, Any]
_TRAINING_PASSES = 3  # a backward pass costs about two forward passes
DEVIATION = "_std"
_GIGA, _PETA = 1e9, 1e15


def outcome(workspace: Workspace, job: Evaluation | None) -> Outcome | None:
    """Read the result of an evaluation, None as long as it is not finished."""
    if job is None or not workspace.done(job.name).is_file():
        return None
    return read(workspace.place("evaluations", job.name))


def first_stages(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return Table 8: a row for each first stage, trained or given."""
    rows = {}
    for entry in plan.entries:
        found = outcome(workspace, entry.first_stage)
        if found is not None:
            node = entry.resolved.first_stage.content["model"]["params"]["autoencoder"]["params"]
            regularizer = node["regularizer"]
            codes = regularizer.get("params", {}).get("num_codes", regularizer["target"].rpartition(".")[2])
            name, is_trained = entry.resolved.first_stage.name, entry.resolved.first_stage.checkpoint is None
            minutes = _timed("training minutes", workspace.seconds(name) if is_trained else None, 60)
            shape = {"f": entry.resolved.facts.factor, "|Z|": codes, "c": node["embed_dim"]}
            rows[entry.first_stage.name] = {**shape, **found.values, **minutes, "name": name}
    return sorted(rows.values(), key=lambda row: row["f"])


def sizes(plan: StudyPlan) -> list[Row]:
    """Return a row for each trial: what is known before anything is trained."""
    return [_size(entry) for entry in plan.entries]


def _size(entry: Entry) -> Row:
    facts = entry.resolved.facts
    row: Row = {**_labels(entry), "latent": "x".join(map(str, facts.latent_shape)), "U-Net": facts.parameters}
    row |= {"GFLOP a forward pass": facts.network_flops / _GIGA, "GFLOP a decoding": facts.decoder_flops / _GIGA}
    return row | {"batch": facts.global_batch, "learning rate": facts.learning_rate}


def trials(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return a row for each trial, trained or not: its size, its cost, and how it was judged at the end."""
    return [_trial(plan, entry, workspace) for entry in plan.entries]


def _trial(plan: StudyPlan, entry: Entry, workspace: Workspace) -> Row:
    row = _size(entry)
    if workspace.done(entry.training.name).is_file():
        steps = workspace.steps(entry.training.name)
        row |= {"steps": steps, **_cost(entry, steps, workspace)}
        row |= _timed("training minutes", workspace.seconds(entry.training.name), 60)
    found = outcome(workspace, entry.final[plan.study.judgement.curve_steps])
    return row if found is None else {**row, **found.values}


def _labels(entry: Entry) -> Row:
    return {**entry.resolved.trial.labels, "seed": entry.resolved.trial.seed}


def _cost(entry: Entry, steps: int, workspace: Workspace) -> Row:
    facts = entry.resolved.facts
    samples = steps * facts.global_batch
    cost = {"samples": samples, "training PFLOP": _TRAINING_PASSES * samples * facts.network_flops / _PETA}
    if entry.pace is not None:
        cost["minutes"] = steps * workspace.pace(entry.pace.name) / 60
    return cost


def _timed(name: str, seconds: float | None, unit: float) -> Row:
    return {} if seconds is None else {name: seconds / unit}


def figures(plan: StudyPlan, workspace: Workspace) -> list[str]:
    """List the figures by which trials were judged at the end, without deviations."""
    found = [outcome(workspace, job) for entry in plan.entries for job in entry.final.values()]
    names = [name for one in found if one is not None for name in one.values]
    return [name for name in dict.fromkeys(names) if DEVIATION not in name]


def progress(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return Figure 6: how good every trial is along its training; `part` counts those of the budget."""
    rows = []
    for entry in plan.entries:
        for part, job in enumerate((*entry.curve, entry.final[plan.study.judgement.curve_steps]), start=1):
            found = outcome(workspace, job)
            if found is not None:
                step = job.step(workspace)
                cost = _cost(entry, step, workspace)
                rows.append({**_labels(entry), "part": part, "step": step, **cost, **found.values})
    return rows


def throughput(plan: StudyPlan, workspace: Workspace) -> list[Row]:
    """Return Figure 7: how good and how fast every trial is at the end, for several numbers of steps."""
    rows = []
    for entry in plan.entries:
        for steps, job in entry.final.items():
            found = outcome(workspace, job)
            if found is not None:
                cost = {"samples/s": found.count / found.seconds, "GFLOP a sample": _sample_cost(entry, steps)}
                rows.append({**_labels(entry), "sampling steps": steps, **cost, **found.values})
    return rows


def _sample_cost(entry: Entry, steps: int) -> float:
    """Count the GFLOP of drawing one picture, decoded; guidance runs the network twice a step."""
    facts, sample = entry.resolved.facts, entry.resolved.trial.point.sample
    passes = steps * (1 if float(sample.get("scale", 1)) == 1 else 2)
    return (passes * facts.network_flops + facts.decoder_flops) / _GIGA


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
