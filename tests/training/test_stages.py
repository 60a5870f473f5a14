"""A script of several stages does not go on with a stage that was stopped before its end."""

from pathlib import Path

import pytest
import torch
import yaml

from ldm.errors import UserError
from ldm.training import stages


def finished_run(logs: Path, made: int, wanted: int | None) -> Path:
    run = logs / "2026-01-01T00-00-00_tiny"
    (run / "checkpoints").mkdir(parents=True)
    (run / "configs").mkdir()
    torch.save({"global_step": made, "state_dict": {}}, run / "checkpoints" / "last.ckpt")
    trainer = {} if wanted is None else {"max_steps": wanted}
    (run / "configs" / "config.yaml").write_text(yaml.safe_dump({"lightning": {"trainer": trainer}}), encoding="utf-8")
    return run


@pytest.mark.parametrize(("made", "wanted"), [(5, 5), (5, None)])
def test_a_run_that_reached_its_end_is_returned(tmp_path, monkeypatch, made, wanted):
    run = finished_run(tmp_path, made, wanted)
    monkeypatch.setattr(stages, "train", lambda arguments: 0)
    assert stages.train_config(Path("configs/tiny.yaml"), tmp_path, (), "one") == run


def test_a_run_that_was_stopped_is_named_with_how_to_go_on(tmp_path, monkeypatch):
    finished_run(tmp_path, 3, 5)
    monkeypatch.setattr(stages, "train", lambda arguments: 0)
    with pytest.raises(UserError, match=r"step 3 of 5; it goes on with: python main.py -t -r .*_tiny"):
        stages.train_config(Path("configs/tiny.yaml"), tmp_path, (), "one")


def test_a_failed_training_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "train", lambda arguments: 1)
    with pytest.raises(UserError, match="the training of tiny stopped"):
        stages.train_config(Path("configs/tiny.yaml"), tmp_path, (), "one")
