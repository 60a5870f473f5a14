"""The jobs of a study in the order in which they may be run, and which of them belong to which trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ldm.ablation.jobs import Evaluation, Training
from ldm.ablation.resolve import Content, Resolved, digest
from ldm.ablation.study import Budget, EvaluationSpec, Sampling, Study
from ldm.ablation.workspace import Job
from ldm.errors import UserError

FIRST_STAGE_SEED = 23  # first stages are trained once, whatever the seeds of the study
_SPEED_STEPS = 120


@dataclass(frozen=True)
class TrialJobs:
    """The trainings of a trial, and its evaluations: on the way and, by number of sampling steps, at the end."""

    resolved: Resolved
    training: Training
    speed: Training | None
    first_stage: Evaluation | None
    curve: tuple[Evaluation, ...]
    final: dict[int, Evaluation]

    @property
    def trainings(self) -> list[Training]:
        """Return the short training, if there is one, and the one that is evaluated."""
        return [job for job in (self.speed, self.training) if job is not None]

    @property
    def evaluations(self) -> list[Evaluation]:
        """Return all evaluations."""
        return [job for job in (self.first_stage, *self.curve, *self.final.values()) if job is not None]

    @property
    def group(self) -> str:
        """Return what trials have in common that must be run by the same task of an array."""
        return self.training.first_stage or self.training.name


@dataclass(frozen=True)
class StudyPlan:
    """All trials with their jobs, and the trainings of first stages that they share."""

    study: Study
    trials: tuple[TrialJobs, ...]
    first_stages: tuple[Training, ...]

    @property
    def jobs(self) -> list[Job]:
        """Return every job once, what is needed first before what needs it."""
        trainings = [job for trial in self.trials for job in trial.trainings]
        evaluations = [job for trial in self.trials for job in trial.evaluations]
        unique: dict[str, Job] = {}
        for job in (*self.first_stages, *trainings, *evaluations):
            unique.setdefault(job.name, job)  # what several trials share waits for the first of them
        return list(unique.values())

    def part(self, task: int, of: int) -> StudyPlan:
        """Return the share of task number `task` (from 0) of an array of `of`; no task waits for another.

        Trials that share a first stage stay together. UserError for a task that is not in the array.
        """
        if not 0 <= task < of:
            raise UserError(f"--task {task} --of {of}: tasks count from 0 to {of - 1}")
        groups = list(dict.fromkeys(trial.group for trial in self.trials))
        mine = set(groups[task::of])
        trials = tuple(trial for trial in self.trials if trial.group in mine)
        return replace(self, trials=trials, first_stages=tuple(job for job in self.first_stages if job.name in mine))


def plan(study: Study, resolved: Sequence[Resolved]) -> StudyPlan:
    """Return the jobs of resolved trials."""
    stages = {one.first_stage.name: one.first_stage for one in resolved if one.first_stage is not None}
    trained = [stage for stage in stages.values() if stage.checkpoint is None]
    first_stages = tuple(Training(stage.name, stage.content, FIRST_STAGE_SEED) for stage in trained)
    return StudyPlan(study, tuple(_jobs(study, one) for one in resolved), first_stages)


def _jobs(study: Study, resolved: Resolved) -> TrialJobs:
    training = _training(study.budget, resolved)
    speed = None
    if study.budget.kind == "minutes":
        short, content = Budget(steps=_SPEED_STEPS), _without_validation(resolved.content)
        speed = replace(training, name=f"{training.name}-speed", budget=short, content=content)
        training = replace(training, speed=speed.name)
    spec, points, sampling = study.evaluation, study.budget.points, resolved.trial.variant.sampling
    parts, name = [(part, points) for part in range(1, points)], training.name
    curve = tuple(_of_samples(spec, name, spec.curve_steps, sampling, part) for part in parts)
    final = {steps: _of_samples(spec, name, steps, sampling) for steps in spec.all_steps}
    return TrialJobs(resolved, training, speed, _of_first_stage(spec, resolved), curve, final)


def _training(budget: Budget, resolved: Resolved) -> Training:
    stage, weights = resolved.first_stage, {}
    if stage is not None:
        weights = {"first_stage": stage.name} if stage.checkpoint is None else {"checkpoint": stage.checkpoint}
    return Training(resolved.name, resolved.content, resolved.trial.seed, **weights, budget=budget)


def _without_validation(content: Content) -> Content:
    lightning = content.get("lightning", {})
    return {**content, "lightning": {**lightning, "trainer": {**lightning.get("trainer", {}), "limit_val_batches": 0}}}


def _of_samples(
    spec: EvaluationSpec, training: str, steps: int, sampling: Sampling, part: tuple[int, int] | None = None
) -> Evaluation:
    when = "end" if part is None else f"part{part[0]}of{part[1]}"
    name = f"{training}-{digest(asdict(sampling), asdict(spec.of_samples))[:6]}-{when}-steps{steps}"
    return Evaluation(name, training, spec.of_samples, steps, sampling, part)


def _of_first_stage(spec: EvaluationSpec, latent: Resolved) -> Evaluation | None:
    """Evaluate a first stage inside the latent model, so that all are measured by that one's images, as in Table 8."""
    if latent.first_stage is None:
        return None
    images = latent.content["data"]["params"].get("validation")
    name = f"{latent.first_stage.name}-measured-{digest(asdict(spec.of_first_stages), images)[:6]}"
    return Evaluation(name, latent.name, spec.of_first_stages)
