"""Two processes train on uneven, damaged shards through main.py: no hang, and together they see what one sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data"))
from picture_files import write_tar  # noqa: E402

CONFIG = """
model:
  target: ldm.training.autoencoder.AutoencoderTraining
  base_learning_rate: 1.0e-3
  params:
    autoencoder:
      target: ldm.models.autoencoder.Autoencoder
      params:
        architecture:
          target: ldm.networks.encoder_decoder.Architecture
          params: {channels: 32, channel_mult: [1], num_res_blocks: 1, z_channels: 2, resolution: 8, attention: none}
        regularizer: {target: ldm.autoencoder.regularizers.KL}
        embed_dim: 2
    loss: {target: ldm.autoencoder.losses.KLLoss, params: {disc_start: 1000, perceptual_loss: null}}
lightning:
  trainer: {accelerator: cpu, log_every_n_steps: 1, num_sanity_val_steps: 0, max_epochs: 2}
  callbacks: {image_logger: null, progress: null}
"""


def write_config(folder: Path, samples_per_epoch: int | None) -> None:
    damaged = {2: {"png": b"no picture"}, 9: {"txt": b"\xff"}}
    for number, (first, last) in enumerate([(0, 7), (7, 8), (8, 13)]):
        write_tar(folder / f"train-{number}.tar", range(first, last), lambda i: damaged.get(i, {}))
    write_tar(folder / "val-0.tar", range(20, 25))
    shards = {"target": "ldm.data.shards.shards.Shards", "params": {"size": 8, "urls": "train-*.tar"}}
    train = {**shards, "params": {**shards["params"], "samples_per_epoch": samples_per_epoch}}
    validation = {**shards, "params": {**shards["params"], "urls": "val-*.tar"}}
    params = {"batch_size": 2, "num_workers": 0, "max_bad_fraction": 0.5, "train": train, "validation": validation}
    data = {"data": {"target": "ldm.data.core.module.DataModule", "params": params}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**yaml.safe_load(CONFIG), **data}))


def captions(folder: Path, world: int, name: str, *words: str) -> list[list[str]]:
    """Train, and give what each rank was trained on."""
    (folder / name).mkdir()
    command = [sys.executable, str(ROOT / "main.py"), "-b", "config.yaml", "-t", "-l", name, "--devices", str(world)]
    report = ["lightning.callbacks.report.target=rank_report.RankReport"]
    report += [f"lightning.callbacks.report.params.directory={folder / name}"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "e2e")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *report, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "unreadable so far" in done.stderr
    return [json.loads((folder / name / f"rank-{rank}.json").read_text())["captions"] for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("samples_per_epoch", [8, None])
def test_two_processes_see_what_one_sees(tmp_path: Path, samples_per_epoch: int | None) -> None:
    write_config(tmp_path, samples_per_epoch)
    (alone,) = captions(tmp_path, 1, "one", "data.params.batch_size=4")
    shares = captions(tmp_path, 2, "two", "--strategy", "ddp")
    assert len(alone) == 2 * (samples_per_epoch or 12)
    assert [caption for both in zip(*shares, strict=True) for caption in both] == alone
