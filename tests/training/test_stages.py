"""A script of several stages does not go on with a stage that was stopped before its end."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from tiny import autoencoder_training_config, node, run_config

from ldm.errors import UserError
from ldm.training.stages import train_config


class Signal(pl.Callback):
    """Asks the run to stop in its second step."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shapes = node("toy.shapes.Shapes", num_samples=8, size=8, fields=[])
    lightning = {"trainer": {"max_steps": 3, "limit_val_batches": 0}, "callbacks": {"image_logger": None}}
    path = tmp_path / "tiny.yaml"
    content = run_config(autoencoder_training_config(), shapes, shapes, batch_size=4, lightning=lightning)
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_run_that_reached_its_end_is_returned(config: Path, tmp_path: Path) -> None:
    run = train_config(config, tmp_path / "logs", ["training.learning_rate=1.0e-4"], "one")
    assert run.parent == tmp_path / "logs" and run.name.endswith("_tiny")
    assert yaml.safe_load((run / "configs" / "config.yaml").read_text())["training"]["learning_rate"] == 1e-4


def test_a_run_that_was_stopped_is_named_with_how_to_go_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_ALLOW", __name__)
    with pytest.raises(UserError, match=r"step 2; it goes on with: python main.py -t -r .*_tiny"):
        train_config(config, tmp_path / "logs", [f"lightning.callbacks.stop.target={__name__}.Signal"], "one")


def test_a_failed_training_is_an_error(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.params.train.params.size"):
        train_config(config, tmp_path / "logs", ["data.params.train.params.size=eight"], "one")
