"""Train and evaluate a trial. Each training and evaluation is a step that is done once (see `Workspace.once`).

Steps are named by their content: trials that differ only in sampling share a training, and trials that differ only
behind the first stage share that. A first stage is evaluated inside the latent model, so that all are measured by that
one's images, as in Table 8.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.ablation.resolve import Content, Resolved, digest, sampler
from ldm.ablation.runner import DeviceSlot, run_all
from ldm.ablation.study import Study
from ldm.ablation.workspace import Workspace
from ldm.config.merge import merge
from ldm.errors import UserError
from ldm.evaluation.run import (
    EvaluationOptions,
    ReferenceOptions,
    SampleOptions,
    evaluate_first_stage,
    evaluate_model,
)
from ldm.models.loading import ModelSource
from ldm.training.lightning_fixes.signals import Stopped
from ldm.training.plan import RunOptions
from ldm.training.run import train
from ldm.training.run_folder import new_run, resume_run

_log = logging.getLogger(__name__)
FIRST_STAGE_SEED = 23  # first stages are trained once, whatever the seeds of the study
_SPEED_STEPS = 120


@dataclass(frozen=True)
class Evaluation:
    """An evaluation after `part` of the equal parts of a training.

    steps: of the sampler; None evaluates the first stage.
    """

    name: str
    part: int
    steps: int | None


def first_stage_evaluation(study: Study, trial: Resolved) -> Evaluation | None:
    """Return the evaluation of the first stage, None without one."""
    if trial.first_stage is None:
        return None
    spec, images = study.evaluation, trial.content["data"]["params"].get("validation")
    by = digest(spec.first_stage_metrics, spec.extractor, spec.num_samples, images)[:6]
    return Evaluation(f"{trial.first_stage.name}-measured-{by}", study.budget.points, None)


def sample_evaluations(study: Study, trial: Resolved) -> list[Evaluation]:
    """Return the evaluations of samples: on the way, and for each number of steps at the end."""
    spec, last = study.evaluation, study.budget.points
    by = digest(asdict(trial.sampling), spec.metrics, spec.extractor, spec.num_samples)[:6]
    when = [(part, spec.curve_steps) for part in range(1, last)] + [(last, steps) for steps in spec.all_steps]
    return [Evaluation(f"{trial.name}-{by}-part{part}of{last}-steps{steps}", part, steps) for part, steps in when]


def speed_name(study: Study, trial: Resolved) -> str | None:
    """Return the name of the short training by which the minutes of a budget become steps."""
    return f"{trial.name}-speed" if study.budget.kind == "minutes" else None


def step_names(study: Study, trial: Resolved) -> list[str]:
    """Return the names of all steps of a trial, in the order in which they are done."""
    stage, speed = trial.first_stage, speed_name(study, trial)
    trained = [] if stage is None or stage.checkpoint is not None else [stage.name]
    evaluations = [first_stage_evaluation(study, trial), *sample_evaluations(study, trial)]
    names = [*trained, *([] if speed is None else [speed]), trial.name]
    return [*names, *(evaluation.name for evaluation in evaluations if evaluation is not None)]


def share(trials: Sequence[Resolved], task: int, of: int) -> list[Resolved]:
    """Return the trials of task number `task` (from 0) of an array of `of`; no task waits for another.

    Trials that share a training stay together. UserError for a task that is not in the array.
    """
    if not 0 <= task < of:
        raise UserError(f"task {task} of {of}: tasks count from 0 to {of - 1}")
    mine = list(dict.fromkeys(map(_shared, trials)))[task::of]
    return [trial for trial in trials if _shared(trial) in mine]


def _shared(trial: Resolved) -> str:
    stage = trial.first_stage
    return trial.name if stage is None or stage.checkpoint is not None else stage.name


def device_slots(devices: str, workers: int | None, cpu_workers: int) -> list[DeviceSlot]:
    """Return a slot for each job that may run at a time; they share the threads of the CPU.

    Args:
        devices: auto, cpu, or GPUs by number as 0,1.
        workers: slots on each device; None means `cpu_workers` on the CPU, else one.

    Raises UserError for GPUs that this machine does not have.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if devices == "cpu" or (devices == "auto" and kind is None):
        slots = [DeviceSlot("cpu", {"accelerator": "cpu"})] * (workers or cpu_workers)
    else:
        numbers = ["0"] if devices == "auto" else devices.split(",")
        present = [] if kind is None else list(map(str, range(torch.accelerator.device_count())))
        if not set(numbers) <= set(present):
            hint = "write auto, cpu, or numbers of them as 0,1"
            raise UserError(f"devices {devices}: this machine has {len(present)} GPUs; {hint}")
        slots = [DeviceSlot(f"{kind.type}:{number}", {"gpus": f"{number},"}) for number in numbers] * (workers or 1)
    threads = max((os.cpu_count() or 1) // len(slots), 1)
    return [replace(slot, threads=threads) for slot in slots]


def run_trials(study: Study, trials: Sequence[Resolved], workspace: Workspace, slots: Sequence[DeviceSlot]) -> None:
    """Do what is left of trials, each in a process of its own. UserError names those that failed."""
    workspace.create()
    jobs = {
        f"{trial.name}-{digest(asdict(trial.sampling))[:4]}": partial(run_trial, study, trial, workspace)
        for trial in trials
        if not all(map(workspace.is_done, step_names(study, trial)))
    }
    _log.info("%d of %d trials are to be done", len(jobs), len(trials))
    run_all(jobs, slots, workspace.folder / "logs")


def run_trial(study: Study, trial: Resolved, workspace: Workspace, slot: DeviceSlot) -> None:
    """Do what is left of a trial: train its first stage, unless it has weights, then its model, and evaluate both."""
    if slot.threads is not None:
        torch.set_num_threads(slot.threads)
    points, content = study.budget.points, trial.content
    if (stage := trial.first_stage) is not None:
        weights = stage.checkpoint
        if weights is None:
            _train(stage.name, stage.content, FIRST_STAGE_SEED, workspace, slot)
            weights = str(workspace.finished_run(stage.name))
        content = merge(content, {"model": {"params": {"autoencoder": {"checkpoint": weights}}}})
    seed, pace = trial.trial.seed, None
    if (name := speed_name(study, trial)) is not None:
        short = with_length(content, 1, _SPEED_STEPS)
        short["lightning"]["trainer"]["limit_val_batches"] = 0  # it measures nothing but the speed
        pace = _train(name, short, seed, workspace, slot)["seconds_per_step"]
    length = with_length(content, points, steps_of_a_part(study, content, pace))
    total = _train(trial.name, length, seed, workspace, slot)["steps"]
    for evaluation in (first_stage_evaluation(study, trial), *sample_evaluations(study, trial)):
        if evaluation is not None:
            run = workspace.finished_run(trial.name)
            if evaluation.part < points:
                run = run / "checkpoints" / f"step={total * evaluation.part // points:09}.ckpt"
            _evaluate(study, trial, evaluation, run, workspace, slot)


def steps_of_a_part(study: Study, content: Content, seconds_per_step: float | None = None) -> int:
    """Return the number of training steps between two evaluations; minutes need the speed."""
    budget, amount = study.budget, study.budget.amount
    if budget.kind == "minutes":
        amount *= 60 / seconds_per_step
    elif budget.kind == "samples":
        trainer = content.get("lightning", {}).get("trainer", {})
        amount /= content["data"]["params"]["batch_size"] * trainer.get("accumulate_grad_batches", 1)
    return max(int(amount / budget.points), 1)


def with_length(content: Content, points: int, steps: int) -> Content:
    """Return a config that trains `points` parts of so many steps, and keeps a checkpoint of each."""
    trainer = {"max_steps": points * steps}
    if isinstance(content.get("lightning", {}).get("trainer", {}).get("val_check_interval"), int):
        trainer["val_check_interval"] = steps
    checkpoints = {"params": {"keep_every_n_steps": steps}}
    return merge(content, {"lightning": {"trainer": trainer, "modelcheckpoint": checkpoints}})


def _train(name: str, content: Content, seed: int, workspace: Workspace, slot: DeviceSlot) -> dict[str, Any]:
    """Train to the end, once, going on with the run of this name if there is one. UserError if it was stopped."""

    def work() -> dict[str, Any]:
        begun = workspace.run(name)
        run = new_run(str(workspace.folder / "runs"), name) if begun is None else resume_run(begun)
        try:
            result = train(content, run, seed, RunOptions(**slot.options))
        except Stopped as stop:
            raise UserError(f"{name}: was stopped: {stop}") from stop
        gc.collect()  # trainer and model hold one another; the next step needs their memory
        wanted = content["lightning"]["trainer"].get("max_steps", -1)
        if result.global_step < wanted:
            raise UserError(f"{name}: was stopped at step {result.global_step} of {wanted}")
        return {"steps": result.global_step, "seconds_per_step": result.seconds_per_step}

    return workspace.once(name, work)


def _evaluate(
    study: Study, trial: Resolved, evaluation: Evaluation, run: Path, workspace: Workspace, slot: DeviceSlot
) -> None:
    """Evaluate a run, or a checkpoint in one, once: its samples under the conditions of its validation set."""
    spec, how, steps = study.evaluation, trial.sampling, evaluation.steps
    is_first_stage, out = steps is None, workspace.path("evaluations", evaluation.name)
    metrics = spec.first_stage_metrics if is_first_stage else spec.metrics
    samples = SampleOptions(sampler(how, steps or 1), 1.0 if is_first_stage else how.scale, (how.H, how.W))
    source, device = ModelSource(str(run)), torch.device(slot.device)
    reference = ReferenceOptions(out.parent / "references")
    options = EvaluationOptions(source, device, metrics, spec.extractor, samples, reference, out, spec.num_samples)
    evaluate = evaluate_first_stage if is_first_stage else evaluate_model
    workspace.once(evaluation.name, lambda: evaluate(options, _progress))


def _progress(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, mininterval=30.0)  # into a log file
