"""Loggers as YAML configures them, by one line: what a training wrote is read back.

Of each: metrics, images, the config, and the way to the evaluations of the run.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from breakage.processes import write_config
from mlflow.tracking import MlflowClient
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from ldm.cli.train import main
from ldm.evaluation.run import note_in_run

IMAGES = {"image_logger": {"params": {"every_n_steps": 2, "max_images": 1,
          "sampler": {"target": "ldm.sampling.ddim.DDIM", "params": {"steps": 1}}}}}  # fmt: skip
LOSSES = ("train/loss", "val/loss_simple_ema")


def trained(folder: Path, line: str) -> Path:
    """Train for two steps with a line of YAML; give the run folder."""
    config = write_config(folder, callbacks={**IMAGES, "progress": None}, **yaml.safe_load(line))
    words = ["--max_steps", "2", "lightning.trainer.val_check_interval=2", "data.params.test=null"]
    assert main(["-b", str(config), "-t", "-l", str(folder / "logs"), *words]) == 0
    return next((folder / "logs").iterdir())


def check_config(config: Mapping[str, Any], run: Path) -> None:
    """Compare a config that a logger kept with that of the run, and follow it to an evaluation and to the images."""
    own = yaml.safe_load((run / "configs" / "config.yaml").read_text())
    assert all(config[section] == own[section] for section in ("model", "training", "lightning"))
    check_places(config["run"], run)


def check_places(places: Mapping[str, str], run: Path) -> None:
    out = run.parent.parent / "outputs" / "eval"
    out.mkdir(parents=True)
    (out / "evaluation.json").write_text(json.dumps({"values": {"psnr": 20.5}}))
    note_in_run(run, out)
    (result,) = Path(places["evaluations"]).glob("eval-*/evaluation.json")
    assert json.loads(result.read_text())["values"]["psnr"] == 20.5
    assert Path(places["folder"]).samefile(run) and list(Path(places["images"]).glob("train/inputs_gs-000002_*.png"))


def test_tensorboard(tmp_path: Path) -> None:
    run = trained(tmp_path, "logger: {target: pytorch_lightning.loggers.TensorBoardLogger, params: {name: board}}")
    (events,) = (run / "board").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in board.Scalars("val/loss_simple_ema")] == [2]
    assert board.Images("train/inputs")[0].width > 0
    check_config(yaml.safe_load((events.parent / "hparams.yaml").read_text()), run)


def test_csv(tmp_path: Path) -> None:
    run = trained(tmp_path, "logger: {target: pytorch_lightning.loggers.CSVLogger, params: {name: table}}")
    (table,) = (run / "table").rglob("metrics.csv")
    header, *rows = (line.split(",") for line in table.read_text().splitlines())
    assert set(LOSSES) <= set(header)
    assert [row[header.index("step")] for row in rows if row[header.index("train/loss")]] == ["1", "2"]
    check_config(yaml.safe_load((table.parent / "hparams.yaml").read_text()), run)


def test_mlflow(tmp_path: Path) -> None:
    run = trained(tmp_path, "logger: {target: pytorch_lightning.loggers.MLFlowLogger}")
    client = MlflowClient(f"file:{run / 'mlruns'}")
    (logged,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    history = client.get_metric_history(logged.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2] and "val/loss_simple_ema" in logged.data.metrics
    (artifacts,) = (run / "mlruns").glob(f"*/{logged.info.run_id}/artifacts")
    shown, (saved,) = artifacts / "images/train/inputs_000002.png", (run / "images/train").glob("inputs_gs-000002*.png")
    with Image.open(shown) as image, Image.open(saved) as own:
        assert np.array_equal(image, own)
    config = yaml.safe_load((artifacts / "config.yaml").read_text())
    assert logged.data.params["training/learning_rate"] == str(config["training"]["learning_rate"])
    assert logged.data.params["run/evaluations"] == config["run"]["evaluations"]
    check_config(config, run)


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trained(tmp_path, "logger: {target: pytorch_lightning.loggers.WandbLogger, params: {offline: true}}")
    wandb.finish()  # as at the end of the process: until then the file may lack its last records
    (file,) = run.rglob("offline-run-*/run-*.wandb")
    logged: dict[str, list[str]] = {}
    config: dict[str, Any] = {}
    for record in wandb_records(file.read_bytes()):
        for item in record.history.item if record.HasField("history") else ():
            logged.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
        for item in record.config.update if record.HasField("config") else ():
            config[item.key] = json.loads(item.value_json)
    assert set(LOSSES) <= logged.keys() and len(logged["train/loss"]) == 2
    assert any(name.startswith("train/inputs") for name in logged)
    check_config(config, run)


def wandb_records(content: bytes) -> Iterator[Record]:
    """Read what wandb keeps for its server: after 7 bytes records of crc, length and kind, in blocks of 32 KiB.

    A record that crosses the end of a block is in parts: whole (1), first (2), middle (3), last (4).
    """
    assert content[:4] == b":W&B"
    place, size, parts = 7, 1 << 15, b""
    while place + 7 <= len(content):
        if size - place % size < 7:  # no room for a head: zeros
            place += size - place % size
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts = (b"" if kind in (1, 2) else parts) + content[place + 7 : place + 7 + length]
        if kind in (1, 4):
            yield Record.FromString(parts)
        place += 7 + length
