"""The two kinds of jobs of a study: trainings and evaluations, and the functions that a worker calls for them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.ablation.resolve import Content
from ldm.ablation.study import Budget, Measure, Sampling
from ldm.ablation.workspace import DeviceSlot, Workspace
from ldm.errors import UserError
from ldm.training.lightning_fixes.signals import Stopped
from ldm.training.plan import RunOptions
from ldm.training.run import train
from ldm.training.run_folder import new_run, resume_run


@dataclass(frozen=True)
class Training:
    """Train a first stage, or with `budget` a latent model.

    Args:
        first_stage: name of the training whose weights are used.
        checkpoint: file of weights of the first stage, in place of a training.
        speed: name of the short training by which the minutes of the budget become steps.
    """

    name: str
    content: Content
    seed: int
    first_stage: str | None = None
    checkpoint: str | None = None
    budget: Budget | None = None
    speed: str | None = None
    function = "ldm.ablation.jobs.run_training"

    @property
    def needs(self) -> tuple[str, ...]:
        """Return first stage and short training."""
        return tuple(name for name in (self.first_stage, self.speed) if name is not None)

    def arguments(self, workspace: Workspace, slot: DeviceSlot) -> dict[str, Any]:
        """Return what `run_training` takes: it goes on with the run of this name, if there is one."""
        run = workspace.run(self.name)
        return {
            "config": self.config(workspace),
            "seed": self.seed,
            "name": self.name,
            "folder": str(workspace.folder / "runs"),
            "resume": None if run is None else str(run),
            "options": dict(slot.options),
        }

    def config(self, workspace: Workspace) -> Content:
        """Return the config with the weights of the first stage and the length of the training."""
        content, weights = deepcopy(self.content), self.checkpoint
        if self.first_stage is not None:
            weights = str(workspace.finished_run(self.first_stage))
        if weights is not None:
            content["model"]["params"]["autoencoder"]["checkpoint"] = weights
        if self.budget is not None:
            _set_length(content, self.budget.points, self._steps_of_a_part(workspace))
        return content

    def _steps_of_a_part(self, workspace: Workspace) -> int:
        amount = self.budget.amount
        if self.speed is not None:
            amount = amount * 60 / workspace.result(self.speed)["seconds_per_step"]
        elif self.budget.kind == "samples":
            trainer = self.content.get("lightning", {}).get("trainer", {})
            amount /= self.content["data"]["params"]["batch_size"] * trainer.get("accumulate_grad_batches", 1)
        return max(int(amount / self.budget.points), 1)


def _set_length(content: Content, points: int, steps: int) -> None:
    """Train `points` parts of so many steps, and keep a checkpoint of each."""
    lightning = content.setdefault("lightning", {})
    trainer = lightning.setdefault("trainer", {})
    trainer["max_steps"] = points * steps
    if isinstance(trainer.get("val_check_interval"), int):
        trainer["val_check_interval"] = steps
    checkpoints = lightning.setdefault("modelcheckpoint", {}).setdefault("params", {})
    checkpoints["keep_every_n_steps"] = steps


def run_training(
    config: Content, seed: int, name: str, folder: str, resume: str | None, options: Mapping[str, str]
) -> dict[str, Any]:
    """Train to the end; see `ldm.training.run.train`. UserError if the training was stopped before."""
    run = new_run(folder, name) if resume is None else resume_run(Path(resume))
    try:
        result = train(config, run, seed, RunOptions(**options))
    except Stopped as stop:
        raise UserError(f"{name}: {stop}") from stop
    wanted = config["lightning"]["trainer"].get("max_steps", -1)
    if result.global_step < wanted:
        raise UserError(f"{name}: was stopped at step {result.global_step} of {wanted}")
    return {"steps": result.global_step, "seconds_per_step": result.seconds_per_step}


@dataclass(frozen=True)
class Evaluation:
    """Evaluate a training: samples of `steps` (None: its first stage) at a part of its length (None: the end)."""

    name: str
    training: str
    measure: Measure
    steps: int | None = None
    sampling: Sampling = Sampling()
    part: tuple[int, int] | None = None
    function = "ldm.ablation.evaluate.evaluate_run"

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the training."""
        return (self.training,)

    def step(self, workspace: Workspace) -> int:
        """Return the training step whose checkpoint is evaluated."""
        total = workspace.result(self.training)["steps"]
        return total if self.part is None else total * self.part[0] // self.part[1]

    def arguments(self, workspace: Workspace, slot: DeviceSlot) -> dict[str, Any]:
        """Return the checkpoint with what is measured."""
        run = workspace.finished_run(self.training)
        if self.part is not None:
            run = run / "checkpoints" / f"step={self.step(workspace):09}.ckpt"
        return {
            "run": str(run),
            "folder": str(workspace.path("evaluations", self.name)),
            "device": slot.device,
            "measure": asdict(self.measure),
            "sampling": asdict(self.sampling),
            "steps": self.steps,
        }
