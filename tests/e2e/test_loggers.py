"""Loggers that a config names get what the run logs: read back from the files that they write."""

import csv
from pathlib import Path

import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.training.run import train
from ldm.training.run_folder import new_run

LOGGERS = "pytorch_lightning.loggers"


def test_tensorboard_and_csv_in_one_run(tmp_path: Path) -> None:
    training = tiny.latent_diffusion_config(tiny.unet_config(), tiny.identity_config())
    training["params"]["model"]["params"]["network"]["params"] |= {"in_channels": 3, "out_channels": 3}
    data = tiny.node("toy.shapes.Shapes", num_samples=4, size=tiny.SIZE, fields=[])
    loggers = {
        "board": {"target": f"{LOGGERS}.TensorBoardLogger", "params": {"save_dir": str(tmp_path / "board")}},
        "table": {"target": f"{LOGGERS}.CSVLogger"},
    }
    quiet = {"progress": None, "image_logger": None}
    lightning = {"logger": loggers, "trainer": {"max_steps": 2, "limit_val_batches": 1}, "callbacks": quiet}
    result = train(tiny.run_config(training, data, data, lightning=lightning), new_run(tmp_path))
    written = EventAccumulator(str(next((tmp_path / "board").rglob("events.*")).parent))
    written.Reload()
    steps = [event.step for event in written.Scalars("train/loss")]
    with next(result.folder.rglob("lightning_logs/**/metrics.csv")).open() as file:
        table = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(steps) == len(table) == 2
    values = [event.value for event in written.Scalars("train/loss")]
    assert all(abs(float(row["train/loss"]) - value) < 1e-6 for row, value in zip(table, values, strict=True))
