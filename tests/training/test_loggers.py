"""Loggers as YAML configures them: what a training wrote is read back."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from breakage.processes import write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from ldm.cli.train import main

IMAGES = {"image_logger": {"params": {"every_n_steps": 2, "max_images": 1,
          "sampler": {"target": "ldm.sampling.ddim.DDIM", "params": {"steps": 1}}}}}  # fmt: skip
LOSSES = ("train/loss", "val/loss_simple_ema")


def trained(folder: Path, logger: dict[str, Any]) -> Path:
    """Train for two steps with a logger; give the run folder."""
    config = write_config(folder, callbacks={**IMAGES, "progress": None}, logger=logger)
    words = ["--max_steps", "2", "lightning.trainer.val_check_interval=2", "data.params.test=null"]
    assert main(["-b", str(config), "-t", "-l", str(folder / "logs"), *words]) == 0
    return next((folder / "logs").iterdir())


def test_tensorboard(tmp_path: Path) -> None:
    target = "pytorch_lightning.loggers.TensorBoardLogger"
    run = trained(tmp_path, {"target": target, "params": {"name": "board"}})
    (events,) = (run / "board").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in board.Scalars("val/loss_simple_ema")] == [2]
    assert board.Images("train/inputs")[0].width > 0


def test_csv(tmp_path: Path) -> None:
    run = trained(tmp_path, {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"name": "table"}})
    (table,) = (run / "table").rglob("metrics.csv")
    header, *rows = (line.split(",") for line in table.read_text().splitlines())
    assert set(LOSSES) <= set(header)
    assert [row[header.index("step")] for row in rows if row[header.index("train/loss")]] == ["1", "2"]


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trained(tmp_path, {"target": "pytorch_lightning.loggers.WandbLogger", "params": {"offline": True}})
    wandb.finish()  # as at the end of the process: until then the file may lack its last records
    (file,) = run.rglob("offline-run-*/run-*.wandb")
    logged: dict[str, list[str]] = {}
    for record in wandb_records(file.read_bytes()):
        for item in record.history.item if record.HasField("history") else ():
            logged.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    assert set(LOSSES) <= logged.keys() and len(logged["train/loss"]) == 2
    assert any(name.startswith("train/inputs") for name in logged)


def wandb_records(content: bytes) -> Iterator[Record]:
    """Read what wandb keeps for its server: after 7 bytes records of crc, length and kind, whole ones in a block."""
    assert content[:4] == b":W&B" and len(content) < 2**15, "more than one block"
    place = 7
    while place + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1
        yield Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length
