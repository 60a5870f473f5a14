"""Broken off runs go on as if they had not been: states between steps, faults while saving, what only watches."""

import csv
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fitting import Noise, largest_difference
from tiny import autoencoder_training, class_diffusion

from ldm.data.core.module import DataModule
from ldm.errors import UserError
from ldm.training.lightning_fixes.checkpoints import Checkpoints, Stopped, resuming
from ldm.training.lightning_fixes.metrics_csv import MetricsCsv
from ldm.weights import files as storage
from ldm.weights.load import locate


class Die(BaseException):
    """Ends a run without any of its hooks for errors having a say in what was saved."""


class At(pl.Callback):
    """Do something once, in the first hook of a name at or after a step."""

    def __init__(self, hook: str, step: int, act: Any) -> None:
        self.step, self.act, self.done = step, act, False
        setattr(self, hook, self._maybe)

    def _maybe(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.done and not trainer.sanity_checking and trainer.global_step >= self.step:
            self.done = True
            self.act()


def die() -> None:
    raise Die


def ask(callback: Checkpoints) -> Any:
    return lambda: callback._stop._note(15, None)


def train(folder: Path, model: pl.LightningModule, *more: pl.Callback, **options: Any) -> pl.Trainer:
    """Train 10 steps of 2 samples on 12, with a validation at every third batch, logging every second."""
    folder.mkdir(exist_ok=True)
    saves = {"every_n_steps": 2, "monitor": options.pop("monitor", None)}
    callback = options.pop("callback", None) or Checkpoints(folder, **saves)
    batch_size = options.pop("batch_size", 2)
    workers = options.pop("num_workers", 0)
    data = DataModule(batch_size, train=Noise(12), validation=Noise(4), num_workers=workers, seed=3)
    resume = options.pop("resume", None)
    trainer = pl.Trainer(
        **{"max_steps": 10, "val_check_interval": 3, "check_val_every_n_epoch": None, "log_every_n_steps": 2} | options,
        accelerator="cpu",
        logger=[MetricsCsv(folder / "metrics.csv")],
        callbacks=[callback, *more],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with resuming(trainer, resume):
        trainer.fit(model, data.train_loader(), data.validation_loader(), ckpt_path=resume, weights_only=True)
    return trainer


def rows(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "metrics.csv").open() as file:
        return [tuple(row) for row in csv.reader(file)]


def end(folder: Path) -> dict[str, Any]:
    content = storage.load(folder / "last.ckpt")
    optimizer = {f"{i} {key}": torch.as_tensor(v) for i, s in content["optimizer_states"][0]["state"].items()
                 for key, v in s.items()}  # fmt: skip
    return content["state_dict"] | optimizer


STAGES = {
    "autoencoder": lambda seed: autoencoder_training(seed, disc_start=4, ema_decay=0.9),
    "diffusion": class_diffusion,
}


@pytest.fixture(scope="module", params=sorted(STAGES))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("whole")
    train(folder, STAGES[request.param](0), monitor=None)
    return STAGES[request.param], folder


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 4),
        ("on_train_batch_end", 5),  # of the saved step 4, or in the middle of means
        ("on_validation_batch_start", 6),  # a validation that is due at a step that was saved: made after the resume
        ("on_validation_end", 6),  # ... and here it was made, and is made again; end of the first epoch
        ("on_train_batch_start", 6),
    ],
)
def test_killed_and_resumed_ends_the_same(whole: tuple[Any, Path], tmp_path: Path, hook: str, step: int) -> None:
    build, reference = whole
    with pytest.raises(Die):
        train(tmp_path, build(0), At(hook, step, die))
    train(tmp_path, build(1), resume=tmp_path / "last.ckpt")
    assert largest_difference(end(reference), end(tmp_path)) == 0
    assert rows(tmp_path) == rows(reference)


def test_damaged_values_are_not_gone_on_from(whole: tuple[Any, Path], tmp_path: Path, caplog: Any) -> None:
    build, reference = whole
    with pytest.raises(Die):
        train(tmp_path, build(0), At("on_train_batch_start", 4, die))
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "last.ckpt").write_bytes(content)
    train(tmp_path, build(1), resume=tmp_path / "last.ckpt")
    assert "using previous.ckpt" in caplog.text and caplog.text.count("CRC") == 1
    assert largest_difference(end(reference), end(tmp_path)) == 0
    assert rows(tmp_path) == rows(reference)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before(tmp_path: Path) -> None:
    """Not even for one interval: `previous.ckpt` stays until there is a good `last.ckpt`."""
    with pytest.raises(Die):
        train(tmp_path, class_diffusion(), At("on_train_batch_start", 4, die))
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(Die):
        train(tmp_path, class_diffusion(1), At("on_train_batch_start", 4, die), resume=tmp_path / "last.ckpt")
    saved = {name: storage.load(tmp_path / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")}
    assert saved == {"last.ckpt": 4, "previous.ckpt": 2}
    train(tmp_path, class_diffusion(1), resume=tmp_path / "last.ckpt", max_steps=8)
    assert storage.load(tmp_path / "previous.ckpt")["global_step"] == 6


def test_a_checkpoint_without_the_state_of_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    """Each entry of a checkpoint is missing, or is something else, in turn."""
    train(tmp_path, class_diffusion(), max_steps=2)
    content, wrong, refused = storage.load(tmp_path / "last.ckpt"), [None, "text", [1], {"a": 1}, -1], []
    broken = tmp_path / "broken.ckpt"
    for number, key in enumerate(content):
        rest = {name: value for name, value in content.items() if name != key}
        torch.save(rest if number % 2 else {**rest, key: wrong[number // 2 % len(wrong)]}, broken)
        try:
            train(tmp_path, class_diffusion(1), resume=broken, max_steps=2)
        except UserError as error:
            assert str(error).isprintable() and str(error).startswith(str(broken)) and len(str(error)) <= 300
            refused.append(key)
    assert {"state_dict", "loops", "optimizer_states", "lr_schedulers", "pytorch-lightning_version"} <= set(refused)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start"])
def test_stopped_and_resumed_ends_the_same(whole: tuple[Any, Path], tmp_path: Path, hook: str) -> None:
    build, reference = whole
    callback = Checkpoints(tmp_path, every_n_steps=100)
    with pytest.raises(Stopped):
        train(tmp_path, build(0), At(hook, 3, ask(callback)), callback=callback)
    train(tmp_path, build(1), resume=tmp_path / "last.ckpt")
    assert largest_difference(end(reference), end(tmp_path)) == 0
    assert rows(tmp_path) == rows(reference)


def test_a_finished_run_that_is_prolonged_ends_the_same(whole: tuple[Any, Path], tmp_path: Path) -> None:
    build, reference = whole
    train(tmp_path, build(0), max_steps=6)
    train(tmp_path, build(1), resume=tmp_path / "last.ckpt")
    assert largest_difference(end(reference), end(tmp_path)) == 0
    assert rows(tmp_path) == rows(reference)


def test_logging_validation_and_checkpoints_leave_the_weights_alone(whole: tuple[Any, Path], tmp_path: Path) -> None:
    build, reference = whole
    quiet = build(0)
    silent = {"log_every_n_steps": 1000, "limit_val_batches": 0}
    train(tmp_path, quiet, callback=Checkpoints(tmp_path, every_n_steps=1000, separate_frozen=False), **silent)
    assert largest_difference(storage.load(reference / "last.ckpt")["state_dict"], quiet.state_dict()) == 0


def test_progress_is_recounted_for_other_batches(tmp_path: Path) -> None:
    with pytest.raises(Die):
        train(tmp_path, class_diffusion(), At("on_train_batch_start", 4, die), max_steps=8)
    trainer = train(
        tmp_path,
        class_diffusion(1),
        resume=tmp_path / "last.ckpt",
        batch_size=1,
        accumulate_grad_batches=2,
        max_steps=8,
    )
    assert trainer.global_step == 8 and trainer.current_epoch == 2  # Lightning counts the broken-off one
    batches = trainer.fit_loop.epoch_loop.batch_progress
    assert batches.total.completed == 16 and batches.current.completed == 4
    with pytest.raises(UserError, match="batches of 5"):
        train(tmp_path, class_diffusion(1), resume=tmp_path / "last.ckpt", batch_size=5, max_steps=12)


# ------------------------------------------------------------------------------------------------------------- faults


def failing(monkeypatch: pytest.MonkeyPatch, calls: set[int], code: int) -> None:
    """Let the given calls of fsync on checkpoints fail, counted from 1."""
    original, count = os.fsync, iter(range(1, 100))

    def fsync(handle: int) -> None:
        if "last.ckpt" in os.readlink(f"/proc/self/fd/{handle}") and next(count) in calls:
            raise OSError(code, os.strerror(code))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds names of open files in /proc")


@needs_proc
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_save_that_fails_warns_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, code: int
) -> None:
    failing(monkeypatch, {2, 3}, code)
    train(tmp_path, class_diffusion())
    assert caplog.text.count("was not saved at step") == 2 and os.strerror(code) in caplog.text
    assert storage.load(tmp_path / "last.ckpt")["global_step"] == 10
    assert storage.load(tmp_path / "previous.ckpt")["global_step"] == 8
    assert not list(tmp_path.glob("*.tmp"))


@needs_proc
def test_three_failures_in_a_row_or_a_last_one_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {2, 3, 4, 6}, errno.ENOSPC)
    with pytest.raises(UserError, match="3 saves .*No space left"):
        train(tmp_path, class_diffusion())
    assert storage.load(locate(tmp_path))["global_step"] == 2
    with pytest.raises(UserError, match="the end of the run could not be saved"):
        train(tmp_path, class_diffusion(1), resume=tmp_path / "last.ckpt", max_steps=5)
    assert storage.load(locate(tmp_path))["global_step"] == 4


def test_numbered_checkpoints_stay_up_to_a_number(tmp_path: Path) -> None:
    train(tmp_path, class_diffusion(), callback=Checkpoints(tmp_path, keep_every_n_steps=3, keep_last=2))
    assert sorted(path.name for path in tmp_path.glob("step=*")) == ["step=000000006.ckpt", "step=000000009.ckpt"]
