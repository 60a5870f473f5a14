"""The jobs of a study in the order in which they may be run, and what the report needs to find of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.ablation.jobs import Evaluation, Training
from ldm.ablation.judging import metric_words, sample_words
from ldm.ablation.resolving import Content, FirstStage, Resolved
from ldm.ablation.study import Budget, Judgement, Study
from ldm.ablation.workspace import PACE_STEPS, Job
from ldm.errors import UserError

FIRST_STAGE_SEED = 23  # first stages are trained once, whatever the seeds of the study
_PACE = Budget("steps", PACE_STEPS, points=2)


@dataclass(frozen=True)
class Programs:
    """Name the scripts that do the work."""

    train: Path
    evaluate: Path


@dataclass(frozen=True)
class Entry:
    """Name the jobs of one trial: its trainings, its judgements on the way and, by number of steps, at the end."""

    resolved: Resolved
    training: Training
    pace: Training | None
    first_stage: Evaluation | None
    curve: tuple[Evaluation, ...]
    final: dict[int, Evaluation]

    @property
    def jobs(self) -> list[Job]:
        """List the jobs that are this trial's own."""
        own = [self.pace, self.training, self.first_stage, *self.curve, *self.final.values()]
        return [job for job in own if job is not None]


@dataclass(frozen=True)
class StudyPlan:
    """Hold the trials with their jobs, and the trainings of first stages that they share."""

    study: Study
    entries: tuple[Entry, ...]
    first_stages: tuple[Training, ...]

    @property
    def jobs(self) -> list[Job]:
        """List every job once, what is needed first before what needs it."""
        own = [job for entry in self.entries for job in entry.jobs]
        kinds = {Training: 0, Evaluation: 1}
        ordered = [*self.first_stages, *sorted(own, key=lambda job: kinds[type(job)])]
        unique: dict[str, Job] = {}
        for job in ordered:
            unique.setdefault(job.name, job)  # what several trials share waits for the first of them
        return list(unique.values())

    def part(self, task: int, of: int) -> StudyPlan:
        """Return the share of task number `task` (from 0) of an array of `of`; no task waits for another.

        Trials that share a first stage stay together. UserError for a task that is not in the array.
        """
        if not 0 <= task < of:
            raise UserError(f"--task {task} --of {of}: tasks count from 0 to {of - 1}")
        groups = list(dict.fromkeys(map(_group, self.entries)))
        mine = set(groups[task::of])
        entries = tuple(entry for entry in self.entries if _group(entry) in mine)
        needed = {entry.training.first_stage for entry in entries}
        return replace(
            self, entries=entries, first_stages=tuple(stage for stage in self.first_stages if stage.name in needed)
        )


def _group(entry: Entry) -> str:
    return entry.training.first_stage or entry.training.name


def plan(study: Study, resolved: Sequence[Resolved], programs: Programs) -> StudyPlan:
    """Lay out the jobs of resolved trials."""
    stages = {one.first_stage.name: one.first_stage for one in resolved if one.first_stage is not None}
    trained = [stage for stage in stages.values() if stage.checkpoint is None]
    first_stages = [Training(programs.train, stage.name, stage.content, FIRST_STAGE_SEED) for stage in trained]
    entries = tuple(_entry(study, one, programs) for one in resolved)
    return StudyPlan(study, entries, tuple(first_stages))


def _entry(study: Study, resolved: Resolved, programs: Programs) -> Entry:
    stage, budget, judgement = resolved.first_stage, study.budget, study.judgement
    weights = {} if stage is None else _weights(stage)
    training = Training(
        programs.train, resolved.name, resolved.content, resolved.trial.seed, **weights, budget=budget
    )  # fmt: skip
    pace = None
    if budget.kind == "minutes":
        pace = replace(
            training, name=f"{training.name}-pace", budget=_PACE, content=_unvalidated(resolved.content)
        )  # fmt: skip
        training = replace(training, pace=pace.name)
    sample = resolved.trial.point.sample
    common = metric_words(judgement, judgement.metrics)
    name = f"{training.name}-{_digest(sample, common)}"

    def judged(steps: int, part: tuple[int, int] | None) -> Evaluation:
        where = "end" if part is None else f"part{part[0]}of{part[1]}"
        given = (*common, *sample_words(steps, sample))
        return Evaluation(programs.evaluate, f"{name}-{where}-steps{steps}", training.name, given, part)

    return Entry(
        resolved,
        training,
        pace,
        None if stage is None else _first_stage(stage, resolved, judgement, programs),
        tuple(judged(judgement.curve_steps, (part, budget.points)) for part in range(1, budget.points)),
        {steps: judged(steps, None) for steps in sorted({*judgement.steps, judgement.curve_steps})},
    )


def _unvalidated(content: Content) -> Content:
    """Train without validation, whose time does not shrink with the latents as that of a step does."""
    lightning = content.get("lightning", {})
    return {**content, "lightning": {**lightning, "trainer": {**lightning.get("trainer", {}), "limit_val_batches": 0}}}


def _weights(stage: FirstStage) -> dict[str, str]:
    return {"first_stage": stage.name} if stage.checkpoint is None else {"checkpoint": stage.checkpoint}


def _first_stage(stage: FirstStage, latent: Resolved, judgement: Judgement, programs: Programs) -> Evaluation:
    """Judge a first stage inside the latent model, so that all are judged by the pictures of that, as in Table 8."""
    given = (*metric_words(judgement, judgement.first_stage_metrics), "--first-stage")
    pictures = latent.content["data"]["params"].get("validation")
    return Evaluation(programs.evaluate, f"{stage.name}-judged-{_digest(given, pictures)}", latent.name, given)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:6]
