"""Two ranks through main.py: one that dies takes the other down with it, and a request to one stops both."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_trainings import write_configs

from ldm.weights import files as storage

ROOT = Path(__file__).parents[2]
SECONDS = 240  # a hang would last until the timeout of a collective, half an hour

TROUBLE = """
import os, signal
import pytorch_lightning as pl

class Trouble(pl.Callback):
    def __init__(self, kind, rank):
        self.kind, self.rank = kind, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            if self.kind == "raise":
                raise RuntimeError("the trouble of this rank")
            os.kill(os.getpid(), getattr(signal, self.kind))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_configs(folder)
    (folder / "trouble.py").write_text(TROUBLE)
    return folder


def train(workplace: Path, logs: Path, kind: str, rank: int) -> subprocess.CompletedProcess[str]:
    words = ["-b", "autoencoder-folder.yaml", "-t", "-l", str(logs), "--accelerator", "cpu", "--devices", "2"]
    callback = "lightning.callbacks.trouble"
    words += ["--strategy", "ddp", "data.params.batch_size=1", f"{callback}.target=trouble.Trouble"]
    words += [f"{callback}.params.kind={kind}", f"{callback}.params.rank={rank}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{workplace}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words],
        cwd=workplace, env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


@pytest.mark.proof
@pytest.mark.parametrize(("kind", "rank"), [("raise", 1), ("SIGKILL", 1), ("raise", 0), ("SIGKILL", 0)])
def test_a_rank_that_dies_takes_the_job_down(workplace: Path, tmp_path: Path, kind: str, rank: int) -> None:
    start = time.monotonic()
    done = train(workplace, tmp_path, kind, rank)
    assert done.returncode != 0
    assert time.monotonic() - start < SECONDS
    assert kind != "raise" or "the trouble of this rank" in done.stderr
    assert kind == "raise" or "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (kind, rank) == ("raise", 0) or any(f"rank {rank} (process " in line for line in lines), done.stderr
    assert len(lines) <= 1 and all("start it again" in line and len(line) <= 300 for line in lines)
    assert not list(tmp_path.glob("*/checkpoints/*.ckpt"))


@pytest.mark.proof
@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_one_rank_saves_and_stops_all(workplace: Path, tmp_path: Path, rank: int) -> None:
    done = train(workplace, tmp_path, signal.SIGUSR1.name, rank)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*/checkpoints/last.ckpt")
    assert storage.load(file)["global_step"] in (3, 4)  # asked in step 3, agreed on in the next
    assert "asked to stop; saved step" in done.stderr
