"""Train the same thing on 1, 2 and 4 processes and save where each rank ends: python equal_runs.py FOLDER 1 2 4.

The processes are forked from this one, which imports everything once and computes nothing.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from fitting import Noise
from pytorch_lightning.strategies import DDPStrategy
from tiny import autoencoder_training, class_diffusion
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ldm.data.core.module import DataModule
from ldm.training.ema import ExponentialMovingAverage
from ldm.training.lightning_fixes.checkpoints import Checkpoints
from ldm.training.lr_schedules import WarmUpLinear
from ldm.training.optimization import Optimization

GLOBAL_BATCH, STEPS, TRAINING, VALIDATION = 4, 4, 15, 5  # the fourth step is in the second epoch
RUNS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))  # (processes, batches accumulated)


class Marked(Noise):
    """Give one image with a nan."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index == 0:
            item["image"][0, 0, 0] = float("nan")
        return item


class Report(pl.Callback):
    """Save everything that ranks and runs should agree on."""

    def __init__(self, path: Path) -> None:
        self.path, self.samples = path, []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append([int(caption.rpartition(" ")[2]) for caption in batch["caption"]])

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        (optimizer,) = trainer.optimizers
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        adam = {f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
        report = {
            "weights": pl_module.state_dict(),
            "adam": adam,
            "lr": optimizer.param_groups[0]["lr"],
            "counts": (trainer.global_step, pl_module.seen, int(pl_module.guard.num_skipped)),
            "validation": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
            "samples": self.samples,
        }
        torch.save(report, self.path.with_name(f"{self.path.name}-{trainer.global_rank}.pt"))


def diffusion() -> pl.LightningModule:
    # Some gradients are zero but for rounding, and Adam makes steps of them unless its eps is larger than rounding.
    optimization = Optimization(eps=1e-3, schedule=WarmUpLinear(3, 1.0, 1.0, 0.1, 100), gradient_clip=1.0)
    return class_diffusion(latent_scale="measure", optimization=optimization)


def autoencoder() -> pl.LightningModule:
    return autoencoder_training(disc_start=100, ema_decay=0.9)


# The autoencoder's Adam has a fixed eps, so rounding is made smaller instead.
CASES: dict[str, tuple[Callable[[], pl.LightningModule], type[Noise], str]] = {
    "diffusion": (diffusion, Noise, "32-true"),
    "autoencoder": (autoencoder, Noise, "64-true"),
    "marked": (diffusion, Marked, "32-true"),
}


def fit(case: str, world: int, accumulate: int, folder: Path, part: str = "") -> None:
    """Train a case; part "begun": its first half, by one process; "resumed": from where that ended."""
    make, dataset, precision = CASES[case]
    name = f"{case}{part}-{world}-{accumulate}"
    callbacks: list[pl.Callback] = [Report(folder / name)]
    if part:
        (folder / name).mkdir(exist_ok=True)
        callbacks.append(Checkpoints(folder / name))
    data = DataModule(GLOBAL_BATCH // world // accumulate, dataset(TRAINING), Noise(VALIDATION), num_workers=0, seed=3)
    strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False, gradient_as_bucket_view=True)
    trainer = pl.Trainer(
        max_steps=STEPS // 2 if part == "begun" else STEPS,
        accelerator="cpu", devices=world, strategy="auto" if world == 1 else strategy,
        precision=precision, accumulate_grad_batches=accumulate, num_sanity_val_steps=0, use_distributed_sampler=False,
        default_root_dir=folder, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        logger=False, log_every_n_steps=1, callbacks=callbacks,
    )  # fmt: skip
    model = make()
    if precision == "64-true":
        model.double()  # Lightning would do so after it has loaded a checkpoint
    model.learning_rate = 1e-3
    checkpoint = folder / f"{case}begun-1-1" / "last.ckpt" if part == "resumed" else None
    trainer.fit(model, data.train_loader(accumulate), data.validation_loader(), ckpt_path=checkpoint, weights_only=True)


def average_sharded(folder: Path) -> None:
    """Average a module whose parameters are sharded, through updates, a skipped one, and a swap; save it whole."""
    plain, sharded = (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)) for _ in range(2))
    for module in (plain, sharded):
        for number, parameter in enumerate(module.parameters()):
            nn.init.constant_(parameter, number + 1.0)
    averages = [ExponentialMovingAverage(module, 0.9) for module in (plain, sharded)]
    for layer in [*sharded, sharded]:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    averages[1].shard_like(sharded)
    reports = []
    for module, average in zip((plain, sharded), averages, strict=True):
        for skipped in (False, True, False):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.5)
            average.update(module, torch.tensor(skipped))
        with average.applied_to(module):
            applied = [whole(parameter) for parameter in module.parameters()]
        state = {name: whole(value) for name, value in average.state_dict().items()}
        reports.append({"state": state, "applied": applied, "raw": [whole(p) for p in module.parameters()]})
    torch.save(reports, folder / f"average-2-1-{torch.distributed.get_rank()}.pt")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(world: int, folder: Path) -> None:
    """Run everything of this number of processes in one rank of them."""
    for processes, accumulate in RUNS:
        if processes == world:
            for case in CASES:
                if case != "marked" or accumulate == 1:
                    fit(case, world, accumulate, folder)
    for case in ("diffusion", "autoencoder"):
        if world == 1:
            fit(case, 1, 1, folder, "begun")
        for accumulate in (1, 2) if world < 4 else (1,):
            fit(case, world, accumulate, folder, "resumed")
    if world == 2:
        average_sharded(folder)


def fork(world: int, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if world > 1:
                    os.environ |= {
                        "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                    }  # fmt: skip
                train(world, folder)
                code = 0
            except Exception:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(f"{world} processes ended with {codes}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in map(int, sys.argv[2:]):
        fork(world, Path(sys.argv[1]))
