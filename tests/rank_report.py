"""A callback for the tests of several processes: each writes what it trained on and where it ended."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch


class RankReport(pl.Callback):
    """Write rank-N.json with a digest of all weights, the captions seen, and the random draws of the first step."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.captions: list[str] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.captions += batch["caption"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        buffers = [buffer for name, buffer in pl_module.named_buffers() if "running_" not in name]  # kept per rank
        tensors = [*pl_module.parameters(), *buffers]
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        report = {
            "digest": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
            "captions": self.captions,
            "draws": pl_module.keyed_draws(4).normal((4,)).tolist(),
            "step": trainer.global_step,
            "find_unused": getattr(trainer.strategy.model, "find_unused_parameters", False),
        }
        (self.directory / f"rank-{trainer.global_rank}.json").write_text(json.dumps(report))
