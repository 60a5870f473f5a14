"""The jobs of a study: trainings by main.py and judgements by scripts/evaluate.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from ldm.ablation.outcomes import RESULT
from ldm.ablation.resolving import Content
from ldm.ablation.study import Budget
from ldm.ablation.workspace import Place, Workspace
from ldm.errors import UserError
from ldm.training.stages import steps_made


@dataclass(frozen=True)
class Training:
    """Train a config: a first stage, or with `budget` a latent model on `first_stage`, the name of such a training.

    `pace` names the short training that tells how many steps fit into the minutes of the budget.
    """

    program: Path
    name: str
    content: Content
    seed: int
    first_stage: str | None = None
    checkpoint: str | None = None
    budget: Budget | None = None
    pace: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Name first stage and short training."""
        return tuple(name for name in (self.first_stage, self.pace) if name is not None)

    def command(self, workspace: Workspace, place: Place) -> list[str]:
        """Go on with the run of this name, or begin it."""
        run = workspace.run(self.name)
        if run is not None:
            return [str(self.program), "-t", "--resume", str(run), *place.training]
        config = workspace.config(self.name)
        config.write_text(yaml.safe_dump(self._resolved(workspace), sort_keys=False), encoding="utf-8")
        words = ["--base", str(config), "-t", "--logdir", str(workspace.folder / "runs"), "--name", self.name]
        return [str(self.program), *words, "--seed", str(self.seed), *place.training]

    def _resolved(self, workspace: Workspace) -> Content:
        content = json.loads(json.dumps(self.content))  # a deep copy that is surely plain
        weights = self.checkpoint
        if self.first_stage is not None:
            weights = str(workspace.finished_run(self.first_stage))
        if weights is not None:
            content["model"]["params"]["autoencoder"]["checkpoint"] = weights
        if self.budget is not None:
            batch = content["data"]["params"]["batch_size"]
            batch *= content.get("lightning", {}).get("trainer", {}).get("accumulate_grad_batches", 1)
            _set_length(content, self.budget.points, self._steps_of_a_part(workspace, batch))
        return content

    def _steps_of_a_part(self, workspace: Workspace, batch: int) -> int:
        amount = self.budget.amount
        if self.pace is not None:
            amount = amount * 60 / workspace.pace(self.pace)
        elif self.budget.kind == "samples":
            amount = amount / batch
        return max(int(amount / self.budget.points), 1)

    def check(self, workspace: Workspace) -> None:
        """Raise UserError if the run was asked to stop before its last step."""
        made, wanted = steps_made(workspace.finished_run(self.name))
        if wanted is not None and made < wanted:
            raise UserError(f"was stopped at step {made} of {wanted}")


def _set_length(content: Content, points: int, steps: int) -> None:
    """Train `points` parts of so many steps, and keep a checkpoint of each."""
    lightning = content.setdefault("lightning", {})
    trainer = lightning.setdefault("trainer", {})
    trainer["max_steps"] = points * steps
    if isinstance(trainer.get("val_check_interval"), int):
        trainer["val_check_interval"] = steps
    checkpoints = lightning.setdefault("modelcheckpoint", {}).setdefault("params", {})
    checkpoints["keep_every_n_steps"] = steps


@dataclass(frozen=True)
class Evaluation:
    """Judge the checkpoint of a step of a training (None: the last) with the words of scripts/evaluate.py."""

    program: Path
    name: str
    training: str
    words: tuple[str, ...]
    part: tuple[int, int] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Name the training."""
        return (self.training,)

    def step(self, workspace: Workspace) -> int:
        """Tell the step whose checkpoint is judged."""
        total = workspace.steps(self.training)
        return total if self.part is None else total * self.part[0] // self.part[1]

    def command(self, workspace: Workspace, place: Place) -> list[str]:
        """Evaluate."""
        run = workspace.finished_run(self.training)
        if self.part is not None:
            run = workspace.checkpoint(self.training, self.step(workspace))
        out = str(workspace.place("evaluations", self.name))
        return [str(self.program), "--run", str(run), "--out", out, "--device", place.device, *self.words]

    def check(self, workspace: Workspace) -> None:
        """Raise UserError if there is no result."""
        if not (workspace.place("evaluations", self.name) / RESULT).is_file():
            raise UserError(f"left no {RESULT}")
