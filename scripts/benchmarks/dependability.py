"""Measure what dependability costs: steps of one run, in turns with all of it and without.

With it: draws by sample number, the guard against gradients that are not finite, agreement on signals, diagnosis,
progress, means, metrics.csv and checkpoints. Without: draws of the whole batch, and Lightning's loop alone. Model,
data, optimiser and average are the same, and each step is compared with the one after it, so that the machine's moods
cancel. Then the time to read a checkpoint, whose values are compared with their checksums.

    python scripts/benchmarks/dependability.py --steps 400 --every 100
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.cli.arguments import parse, parse_with_overrides
from ldm.cli.train import plan_of
from ldm.config import instantiate
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.run import build_model
from ldm.training.trainer import build_trainer
from ldm.weights.audit import read_torch

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo" / "txt2img_shapes.yaml"


class Images(Dataset):
    """Noise in memory, so that no time goes into making data."""

    def __init__(self, num_items: int = 256, size: int = 32) -> None:
        self.images = torch.rand(num_items, 3, size, size) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "caption": "a red circle above a blue square"}


class PlainDraws:
    """Draw for a whole batch from the global generator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normals."""
        return torch.randn(shape, device=self.device)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Draw uniforms on the CPU."""
        return torch.rand(shape)


class InTurns(DiffusionTraining):
    """Leave out, while `is_plain`, what makes training dependable."""

    is_plain = False

    def keyed_draws(self, count: int) -> Any:
        """Draw by sample number or for the batch."""
        return PlainDraws(self.device) if self.is_plain else super().keyed_draws(count)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Mark what is not finite, or not."""
        owner = pl.LightningModule if self.is_plain else super()
        owner.backward(*((self,) if self.is_plain else ()), *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check the gradients, or not."""
        if not self.is_plain:
            super().on_before_optimizer_step(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step and average, counting what is left out, or not."""
        if self.is_plain:
            pl.LightningModule.optimizer_step(self, *args, **kwargs)
            self.model_ema.update(self.averaged)
        else:
            super().optimizer_step(*args, **kwargs)

    def on_train_batch_end(self, *args: Any) -> None:
        """Log, or not."""
        if not self.is_plain:
            super().on_train_batch_end(*args)


class Turns(pl.Callback):
    """Switch between the two kinds of step, and time each; the last of the callbacks, so that a step has its own."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        self._all: list[pl.Callback] = []
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: InTurns) -> None:
        """Remember the other callbacks."""
        self._all = list(trainer.callbacks)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: InTurns, batch: Any, batch_idx: int) -> None:
        """Take the time of the step before and begin one of the other kind; saves fall on dependable ones."""
        if trainer.global_step > self.warm_up:
            self.seconds[pl_module.is_plain].append(_clock() - self._began)
        pl_module.is_plain = trainer.global_step % 2 == 0
        trainer.callbacks = [self] if pl_module.is_plain else self._all
        self._began = _clock()


def _clock() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure(steps: int, every: int, warm_up: int, overrides: list[str]) -> dict[str, float]:
    """Train the model of a demo on noise and return medians in seconds, and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-b", str(CONFIG), "-l", folder, "--max_steps", str(steps), "lightning.trainer.limit_val_batches=0"]
        settings = [
            "training.target=dependability.InTurns",
            "--allow",
            "dependability",
            "training.allow_untrained_first_stage=true",
            f"lightning.modelcheckpoint.params.every_n_steps={every}",
            *overrides,
        ]
        plan = plan_of(parse([*words, *settings]))
        plan.lightning["callbacks"] = {"image_logger": None}
        data = instantiate(
            {**plan.config["data"], "params": {**plan.config["data"]["params"], "train": Images()}}, "data"
        )
        model, turns = build_model(plan, data), Turns(warm_up)
        trainer = build_trainer(plan)
        trainer.callbacks.append(turns)
        plan.run.checkpoints.mkdir(parents=True)
        trainer.fit(model, data.train_loader())
    pairs = list(zip(turns.seconds[False], turns.seconds[True], strict=False))
    return {
        "pairs": len(pairs),
        "plain_median_s": statistics.median(plain for _, plain in pairs),
        "dependable_median_s": statistics.median(ours for ours, _ in pairs),
        "median_of_ratios": statistics.median(ours / plain for ours, plain in pairs),
        "ratio_of_sums": sum(ours for ours, _ in pairs) / sum(plain for _, plain in pairs),  # with the checkpoints
    }


def measure_reading(megabytes: int = 512, repeats: int = 5) -> dict[str, float]:
    """Read a checkpoint in memory with and without comparing checksums, and as torch does; return times in the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ckpt"
        torch.save({"state_dict": {f"{i}": torch.randn(megabytes << 14) for i in range(16)}}, path)
        readers = {
            "read_checked": lambda: read_torch(path, resumed=True),
            "read_unchecked": lambda: read_torch(path, resumed=True, checksums=False),
            "read_by_torch": lambda: torch.load(path, weights_only=True),
        }
        seconds = {f"{name}_s": min(_seconds(reader) for _ in range(repeats)) for name, reader in readers.items()}
    return {**seconds, "checked_to_torch": seconds["read_checked_s"] / seconds["read_by_torch_s"]}


def _seconds(reader: Callable[[], Any]) -> float:
    start = time.process_time()
    reader()
    return time.process_time() - start


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="steps from checkpoint to checkpoint, an even number")
    parser.add_argument("--warm-up", type=int, default=6, help="first steps, not counted")
    parser.epilog = "Any further dotted.key=value overrides the config."
    options = parse_with_overrides(parser, None)
    logging.disable(logging.WARNING)
    figures = measure(options.steps, options.every, options.warm_up, options.overrides) | measure_reading()
    sys.stdout.write(json.dumps(figures, indent=1))
    sys.stdout.write("\n")


if __name__ == "__main__":
    import dependability  # by this name a config may name the class above

    dependability.main()
