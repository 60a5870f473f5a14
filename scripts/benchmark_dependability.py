"""Measure what dependability costs: the step of a real run against the bare step of a twin, in turns, in one process.

Ours is everything from the start of one batch to the start of the next: loader, per-sample draws, guard, average,
signals, progress, metrics.csv and checkpoints. The bare step is draws of the whole batch, loss, backward, AdamW and
the average, on a copy of the model with the same batch. Pictures, which are no part of a step, are off.

    python scripts/benchmark_dependability.py --steps 200 --every 50
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch.utils.data import Dataset

from ldm.cli.arguments import parse
from ldm.cli.plan import make_plan
from ldm.cli.train import build_model
from ldm.cli.trainer import build_trainer
from ldm.config import instantiate
from ldm.training.latent_diffusion import LatentDiffusion

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo" / "txt2img_shapes.yaml"


class Images(Dataset):
    """Hold noise in memory, so that no time goes into making data."""

    def __init__(self, num_items: int = 256, size: int = 32) -> None:
        self.images = torch.rand(num_items, 3, size, size) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "caption": "a red circle above a blue square"}


class Turns(pl.Callback):
    """Before each batch of the run, time the run's last step, then a bare step of the twin."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.ours, self.bare = warm_up, [], []
        self._began: float | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: LatentDiffusion) -> None:
        """Copy the model, without the trainer that it belongs to."""
        module_trainer, pl_module._trainer = pl_module._trainer, None
        self.twin = deepcopy(pl_module)
        pl_module._trainer = module_trainer
        self.optimizer = self.twin.configure_optimizers()["optimizer"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LatentDiffusion, batch: Any, batch_idx: int) -> None:
        """Take both times."""
        now = _clock()
        if self._began is not None and trainer.global_step > self.warm_up:
            self.ours.append(now - self._began)
        self._bare_step(batch)
        self._began = _clock()
        if trainer.global_step >= self.warm_up:
            self.bare.append(self._began - now)

    def _bare_step(self, batch: Any) -> None:
        twin = self.twin
        z = twin.latents(batch, torch.randn)
        drop = torch.rand(len(z)) < 0.1
        t, noise = torch.randint(twin.num_steps, (len(z),), device=z.device), torch.randn_like(z)
        loss, _ = twin.loss(z, twin.condition(batch, drop), t, noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        twin.model_ema.update(twin.averaged)


def _clock() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure(steps: int, every: int, warm_up: int, overrides: list[str]) -> dict[str, float]:
    """Train the model of a demo on noise and return medians and means in seconds, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-b", str(CONFIG), "-l", folder, "--max_steps", str(steps), "lightning.trainer.limit_val_batches=0"]
        settings = [
            "model.allow_untrained_first_stage=true",
            f"lightning.modelcheckpoint.params.every_n_steps={every}",
            *overrides,
        ]
        plan = make_plan(parse([*words, *settings]))
        plan.lightning["callbacks"] = {"image_logger": None}
        data = instantiate(
            {**plan.config["data"], "params": {**plan.config["data"]["params"], "train": Images()}}, "data"
        )
        model, turns = build_model(plan, data), Turns(warm_up)
        trainer = build_trainer(plan)
        trainer.callbacks.insert(0, turns)  # its clock starts before the others do anything
        plan.run.create(yaml.safe_load(yaml.safe_dump(plan.config)), plan.seed)
        trainer.fit(model, data.train_loader())
    count = min(len(turns.ours), len(turns.bare))
    ours, bare = turns.ours[:count], turns.bare[:count]
    return {
        "steps": count,
        "bare_median_s": statistics.median(bare),
        "ours_median_s": statistics.median(ours),
        "median_of_ratios": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
        "ratio_of_sums": sum(ours) / sum(bare),  # with the checkpoints
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50, help="steps from checkpoint to checkpoint")
    parser.add_argument("--warm-up", type=int, default=5, help="first steps, not counted")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value of the config")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(json.dumps(measure(options.steps, options.every, options.warm_up, options.overrides), indent=1))


if __name__ == "__main__":
    main()
