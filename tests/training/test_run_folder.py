"""Run folders: which one goes on, with which seed and configs."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from ldm.cli.arguments import Arguments, parse
from ldm.cli.train import config_files
from ldm.distributed import is_first_process
from ldm.errors import UserError
from ldm.training.lightning_fixes.signals import Stopped
from ldm.training.run_folder import RunFolder, choose_run, new_run


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


# ------------------------------------------------------------------------------------------------------- who owns it


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    run = new_run(tmp_path, "demo", "_x")
    with run.claimed() as first, run.claimed() as second, run.claimed() as third:
        paths = [first.path, second.path, third.path]
        assert len(set(paths)) == 3 and all(path.is_dir() and path.name.endswith("_x") for path in paths)
        assert paths[0] == run.path


def test_a_run_that_ends_before_a_step_leaves_nothing(tmp_path: Path) -> None:
    for error in (UserError("a mistake"), Stopped("asked to stop"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_run(tmp_path / "logs").claimed() as run:
            run.log.write_text("model: ...\n")
            raise error
        assert not (tmp_path / "logs").exists()
    with pytest.raises(UserError), new_run(tmp_path / "logs").claimed() as run:
        run.metrics.write_text("step,epoch\n1,0\n")
        raise UserError("after a step")
    assert run.metrics.exists()


def test_other_ranks_neither_make_nor_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with new_run(tmp_path / "logs").claimed() as run:
        assert not run.path.exists()


@pytest.mark.parametrize(
    ("environment", "is_first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "1"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),  # started by Lightning in an interactive job
        ({"NODE_RANK": "1"}, False),  # one command on each host
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_the_first_process_is_known_before_there_is_a_group(environment: dict[str, str], is_first: bool) -> None:
    assert is_first_process(environment) == is_first


def test_a_file_that_cannot_be_made_is_told_by_its_reason(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match="cannot be written .*--logdir"), new_run(tmp_path / "logs").claimed():
        pass
    with pytest.raises(UserError, match="File name too long"), new_run(tmp_path, "n" * 300).claimed():
        pass


@pytest.mark.parametrize("flag", ["name", "postfix"])
def test_names_with_folders_in_them_are_refused(flag: str, tmp_path: Path) -> None:
    for value in ("a/b", "../a", "/tmp"):
        with pytest.raises(UserError, match=f"--{flag}: '{value}'"):
            choose_run(tmp_path, **{flag: value})


# ----------------------------------------------------------------------------------------------------------- records


def recorded(logs: Path, name: str, postfix: str = "") -> Path:
    with new_run(logs, name, postfix).claimed() as run:
        run.record({"model": {}, "training": {}}, 7, {})
    torch.save({"state_dict": {"a": torch.ones(1)}}, run.checkpoints / "last.ckpt")
    return run.path


def test_auto_goes_by_the_order_of_starts_not_by_clock_or_folder(tmp_path: Path) -> None:
    a_run(tmp_path, "2035-01-01T00-00-00_demo")  # of an earlier version: it counts nothing
    first = recorded(tmp_path, "demo")
    first.rename(tmp_path / "2031-01-01T00-00-00_demo")
    recorded(tmp_path, "demo-2")
    last = recorded(tmp_path, "demo").rename(tmp_path / "moved")
    other = recorded(tmp_path, "demo", "_x")
    assert auto(tmp_path).path == last and auto(tmp_path, postfix="_x").path == other
    RunFolder(first.with_name("2031-01-01T00-00-00_demo"), Path("a.ckpt")).record({"model": {}}, 7, {})
    assert auto(tmp_path).path == last  # to go on is no start


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"seed": "7"}', '{"seed": null}', None])
def test_a_run_whose_seed_is_lost_goes_on_only_with_one_given(content: str | None, tmp_path: Path) -> None:
    path = a_run(tmp_path, "2026-01-01T00-00-00_demo")
    file = path / "configs" / "environment.json"
    file.unlink() if content is None else file.write_text(content)
    run = choose_run(tmp_path, resume=str(path))
    with pytest.raises(UserError, match="environment.json is missing or damaged.*--seed"):
        run.seed()
    assert run.seed(3) == 3


@pytest.mark.parametrize("content", [b"", b"a: [", b"\xff\xfe\x00", b"- 1"])
def test_a_damaged_config_is_named_with_the_one_before(content: bytes, tmp_path: Path) -> None:
    path = a_run(tmp_path, "2026-01-01T00-00-00_demo")
    (path / "configs" / "config.yaml").write_bytes(content)
    (path / "configs" / "config-2026-01-01T01-00-00.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="config.yaml.*; config-2026-01-01T01-00-00.yaml is an earlier one"):
        _ = choose_run(tmp_path, resume=str(path)).saved_config


def test_records_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recorded(tmp_path, "demo")
    before = {file: file.read_bytes() for file in (path / "configs").iterdir()}

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        RunFolder(path, path / "checkpoints" / "last.ckpt").record({"model": {}}, 8, {})
    assert before.items() <= {file: file.read_bytes() for file in (path / "configs").iterdir()}.items()
    assert not [file for file in path.rglob(".*")]


@pytest.mark.parametrize("name", ["lock", "train.log", "metrics.csv"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_a_run_writes_to_is_a_file_of_its_own(name: str, kind: str, tmp_path: Path) -> None:
    """In a folder that a stranger sent a link may lead to any file of the user."""
    path, theirs = a_run(tmp_path, "2026-01-01T00-00-00_demo"), tmp_path / "theirs"
    theirs.write_text("precious")
    make = {"link": lambda file: file.symlink_to(theirs), "pipe": os.mkfifo, "folder": Path.mkdir}
    make[kind](path / name)
    with pytest.raises(UserError, match=f"{name}: is a link"), choose_run(tmp_path, resume=str(path)).claimed():
        pass
    assert theirs.read_text() == "precious"


def test_what_is_written_beside_a_file_follows_no_link(tmp_path: Path) -> None:
    path, theirs = a_run(tmp_path, "2026-01-01T00-00-00_demo"), tmp_path / "theirs"
    theirs.write_text("precious")
    for name in (".config.yaml", ".environment.json"):
        (path / "configs" / name).symlink_to(theirs)
    choose_run(tmp_path, resume=str(path)).record({"model": {"a": 1}}, 7, {})
    assert theirs.read_text() == "precious" and not (path / "configs" / "config.yaml").is_symlink()


@pytest.mark.parametrize("content", ["[" * 100_000, "[]" + " " * (1 << 21), None, '{"seed": 1e99}', '{"seed": -1}'])
def test_an_environment_that_is_none_is_not_waited_for(content: str | None, tmp_path: Path) -> None:
    file = a_run(tmp_path, "2026-01-01T00-00-00_demo") / "configs" / "environment.json"
    file.unlink()
    os.mkfifo(file) if content is None else file.write_text(content)
    with pytest.raises(UserError, match="environment.json is missing or damaged"):
        auto(tmp_path).seed()
