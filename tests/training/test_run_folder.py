"""Run folders: which one goes on, with which seed and configs."""

import json
from pathlib import Path

import pytest
import torch

from ldm.cli.arguments import Arguments, parse
from ldm.cli.train import config_files
from ldm.errors import UserError
from ldm.training.run_folder import RunFolder, choose_run


def a_run(logs: Path, name: str, saved: bool = True, seed: int = 7) -> Path:
    run = logs / name
    for folder in ("checkpoints", "configs"):
        (run / folder).mkdir(parents=True)
    (run / "configs" / "config.yaml").write_text("{model: {}, training: {}}\n")
    (run / "configs" / "environment.json").write_text(json.dumps({"seed": seed}))
    if saved:
        torch.save({"state_dict": {"a": torch.ones(1)}}, run / "checkpoints" / "last.ckpt")
    return run


def auto(logs: Path, name: str = "demo", postfix: str = "") -> RunFolder:
    return choose_run(logs, name, postfix, "auto")


def arguments(*words: str) -> Arguments:
    return parse(["-b", "configs/demo.yaml", "-t", *words])


def test_auto_takes_the_newest_run_of_the_name_that_saved_something(tmp_path: Path) -> None:
    a_run(tmp_path, "2026-01-01T00-00-00_demo")
    newest = a_run(tmp_path, "2026-01-03T00-00-00_demo-2")
    a_run(tmp_path, "2026-01-04T00-00-00_demo", saved=False)
    a_run(tmp_path, "2026-01-05T00-00-00_other_demo")
    run = auto(tmp_path)
    assert run.path == newest and run.checkpoint == newest / "checkpoints" / "last.ckpt"
    saved = str(newest / "configs" / "config.yaml")
    assert config_files(arguments("-r", "auto"), run) == [saved]
    assert config_files(arguments("-r", str(newest)), run) == [saved, "configs/demo.yaml"]
    assert auto(tmp_path, "other_demo").path.name == "2026-01-05T00-00-00_other_demo"


def test_auto_starts_anew_where_there_is_nothing(tmp_path: Path) -> None:
    run = auto(tmp_path / "absent")
    assert run.is_new and config_files(arguments("-r", "auto"), run) == ["configs/demo.yaml"] and run.seed() == 23
    a_run(tmp_path, "2026-01-01T00-00-00_demo")
    assert auto(tmp_path, postfix="_x").is_new


def test_a_run_keeps_its_seed_unless_told_otherwise(tmp_path: Path) -> None:
    path = a_run(tmp_path, "2026-01-01T00-00-00_demo", seed=7)
    for resume, given, seed in ((str(path), None, 7), (str(path), 5, 5), ("", 9, 9), ("", None, 23)):
        assert choose_run(tmp_path / "new", resume=resume).seed(given) == seed


def test_a_truncated_newest_checkpoint_falls_back(tmp_path: Path) -> None:
    path = a_run(tmp_path, "2026-01-01T00-00-00_demo")
    last = path / "checkpoints" / "last.ckpt"
    last.with_name("previous.ckpt").write_bytes(last.read_bytes())
    last.write_bytes(last.read_bytes()[:500])
    assert choose_run(tmp_path, resume=str(path)).checkpoint == last.with_name("previous.ckpt")
    last.with_name("previous.ckpt").unlink()
    with pytest.raises(UserError, match="truncated"):
        choose_run(tmp_path, resume=str(path))
