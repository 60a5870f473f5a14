"""Two processes train on uneven, damaged shards through main.py: no hang, and together they see what one sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from picture_files import write_tar
from tiny import autoencoder_config, autoencoder_training_config, node, run_config

ROOT = Path(__file__).resolve().parents[2]


def write_config(folder: Path, samples_per_epoch: int | None) -> None:
    damaged = {2: {"png": b"no picture"}, 9: {"txt": b"\xff"}}
    for number, (first, last) in enumerate([(0, 7), (7, 8), (8, 13)]):
        write_tar(folder / f"train-{number}.tar", range(first, last), lambda i: damaged.get(i, {}))
    write_tar(folder / "val-0.tar", range(20, 25))
    train, validation = (
        node("data.shards.shards.Shards", size=8, urls=f"{name}-*.tar", samples_per_epoch=length)
        for name, length in (("train", samples_per_epoch), ("val", None))
    )
    autoencoder = autoencoder_config(channel_mult=[1], attention="none")
    model = autoencoder_training_config(autoencoder, with_discriminator=False)
    lightning = {"trainer": {"max_epochs": 2}, "callbacks": {"image_logger": None, "progress": None}}
    config = run_config(model, train, validation, lightning=lightning)
    config["data"]["params"]["max_bad_fraction"] = 0.5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def captions(folder: Path, world: int, name: str, *words: str) -> list[list[str]]:
    """Train, and give what each rank was trained on."""
    (folder / name).mkdir()
    command = [sys.executable, str(ROOT / "main.py"), "-b", "config.yaml", "-t", "-l", name, "--devices", str(world)]
    report = ["--allow", "rank_report", "lightning.callbacks.report.target=rank_report.RankReport"]
    report += [f"lightning.callbacks.report.params.directory={folder / name}"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *report, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "unreadable so far" in done.stderr
    return [json.loads((folder / name / f"rank-{rank}.json").read_text())["captions"] for rank in range(world)]


@pytest.mark.proof
@pytest.mark.parametrize("samples_per_epoch", [8, None])
def test_two_processes_see_what_one_sees(tmp_path: Path, samples_per_epoch: int | None) -> None:
    write_config(tmp_path, samples_per_epoch)
    (alone,) = captions(tmp_path, 1, "one", "data.params.batch_size=4")
    shares = captions(tmp_path, 2, "two", "--strategy", "ddp")
    assert len(alone) == 2 * (samples_per_epoch or 12)
    assert [caption for both in zip(*shares, strict=True) for caption in both] == alone
