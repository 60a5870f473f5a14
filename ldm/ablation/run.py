"""Train and evaluate a trial. Each training and evaluation is a step that is done once (see `Workspace.once`).

Steps are named by their content: trials that differ only in sampling share a training, and trials that differ only
behind the first stage share that. A first stage is evaluated inside the latent model, so that all are measured by that
one's images, as in Table 8.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.ablation.resolve import Content, Resolved, data_overrides
from ldm.ablation.runner import DeviceSlot, Job, run_all
from ldm.ablation.sampling import guidance, sampler
from ldm.ablation.study import Study
from ldm.ablation.workspace import Workspace, digest
from ldm.config.merge import merge
from ldm.errors import UserError
from ldm.evaluation.run import (
    EvaluationOptions,
    ReferenceOptions,
    SampleOptions,
    evaluate_first_stage,
    evaluate_model,
)
from ldm.models.guidance import Guidance
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
    on_the_way = range(1, last) if trial.checkpoint is None else ()
    when = [(part, spec.curve_steps) for part in on_the_way] + [(last, steps) for steps in spec.all_steps]
    return [Evaluation(f"{trial.name}-{by}-part{part}of{last}-steps{steps}", part, steps) for part, steps in when]


def speed_name(study: Study, trial: Resolved) -> str | None:
    """Return the name of the short training by which the minutes of a budget become steps."""
    is_needed = study.budget.kind == "minutes" and trial.checkpoint is None
    return f"{trial.name}-speed" if is_needed else None


def step_names(study: Study, trial: Resolved) -> list[str]:
    """Return the names of all steps of a trial, in the order in which they are done."""
    stage, speed = trial.first_stage, speed_name(study, trial)
    trained = [] if stage is None or stage.checkpoint is not None else [stage.name]
    evaluations = [first_stage_evaluation(study, trial), *sample_evaluations(study, trial)]
    trained += [name for name in (speed, trial.name) if name is not None and trial.checkpoint is None]
    return [*trained, *(evaluation.name for evaluation in evaluations if evaluation is not None)]


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
    threads = max(torch.get_num_threads() // len(slots), 1)
    return [replace(slot, threads=threads) for slot in slots]


def run_trials(study: Study, trials: Sequence[Resolved], workspace: Workspace, slots: Sequence[DeviceSlot]) -> None:
    """Do what is left of trials; UserError names the processes that failed.

    Those that share a training share processes, too, one a slot: to begin one takes longer than to draw a few samples.
    """
    workspace.create()
    left = [trial for trial in trials if not all(map(workspace.is_done, step_names(study, trial)))]
    _log.info("%d of %d trials are to be done", len(left), len(trials))
    jobs: dict[str, Job] = {}
    for name in dict.fromkeys(trial.name for trial in left):
        same = [trial for trial in left if trial.name == name]
        parts = [same[i :: len(slots)] for i in range(min(len(slots), len(same)))]
        jobs |= {f"{name}-{i}": partial(_run_each, study, part, workspace) for i, part in enumerate(parts)}
    run_all(jobs, slots, workspace.folder / "logs")


def _run_each(study: Study, trials: Sequence[Resolved], workspace: Workspace, slot: DeviceSlot) -> None:
    """Do trials one after the other; one that fails does not stop the others. UserError for the first that failed."""
    failed = None
    for trial in trials:
        try:
            run_trial(study, trial, workspace, slot)
        except UserError as error:
            _log.error("%s: %s", trial.trial, error)
            failed = failed or error
    if failed is not None:
        raise failed


def run_trial(study: Study, trial: Resolved, workspace: Workspace, slot: DeviceSlot) -> None:
    """Do what is left of a trial: train what has no weights yet, first stage and model, and evaluate both."""
    if slot.threads is not None:
        torch.set_num_threads(slot.threads)
    if trial.checkpoint is None:
        steps = _train_both(study, trial, workspace, slot)
        run = workspace.finished_run(trial.name)
    else:
        run = Path(trial.checkpoint)
    for evaluation in (first_stage_evaluation(study, trial), *sample_evaluations(study, trial)):
        if evaluation is not None:
            weights = run
            if evaluation.part < study.budget.points:
                weights = run / "checkpoints" / f"step={steps * evaluation.part // study.budget.points:09}.ckpt"
            _evaluate(study, trial, evaluation, weights, workspace, slot)


def _train_both(study: Study, trial: Resolved, workspace: Workspace, slot: DeviceSlot) -> int:
    """Train the first stage, unless it has weights, and the model; return the number of steps of the latter."""
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
    return _train(trial.name, length, seed, workspace, slot)["steps"]


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
    source = ModelSource(str(run), weights="ema" if is_first_stage else how.weights)
    guided = Guidance() if is_first_stage else guidance(how, source)
    first = 0 if trial.checkpoint is None else trial.trial.seed * spec.num_samples  # nothing else differs by seed then
    samples = SampleOptions(sampler(how, steps or 1), guided, (how.H, how.W), seed=first)
    device, reference = torch.device(slot.device), ReferenceOptions(out.parent / "references")
    overrides = () if trial.checkpoint is None else data_overrides(trial.trial)
    options = EvaluationOptions(
        source, device, metrics, spec.extractor, samples, reference, out, spec.num_samples, overrides=overrides
    )
    evaluate = evaluate_first_stage if is_first_stage else evaluate_model
    workspace.once(evaluation.name, lambda: evaluate(options, _progress))


def _progress(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, mininterval=30.0)  # into a log file
