"""Train a toy of every conditional task of the paper, and measure whether its samples follow the conditions."""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldm import config
from ldm.data.core.loader import collate
from ldm.errors import UserError
from ldm.evaluation.report import Section, image_sheet, write_page
from ldm.models.loading import LoadedModel
from ldm.toy.digit_classifier import digit_classifier
from ldm.toy.digits import Digits
from ldm.toy.runs import CONFIGS, Progress, Sampling, load_run, sample_all
from ldm.toy.task_table import Figures, Task, condition_images, digit_task, photo_tasks, scene_tasks
from ldm.training.interrupt import stopped_by_sigterm
from ldm.training.stages import train_config

_log = logging.getLogger(__name__)
FIRST_STAGES = {
    **dict.fromkeys(("text", "layout", "semantic", "retrieval"), "autoencoder_shapes"),
    **dict.fromkeys(("class", "superres", "inpainting"), "autoencoder_photos"),
}
NAMES = tuple(FIRST_STAGES)
NEED_PHOTOS = {name for name, stage in FIRST_STAGES.items() if stage == "autoencoder_photos"}
_SHOWN = 8


@dataclass(frozen=True)
class Settings:
    """How tasks are trained and measured.

    folder: where runs, images and page go; photos: folder with train/ and val/; num_samples: validation items that a
    task is measured by; overrides: of all trainings.
    """

    folder: Path
    device: torch.device
    progress: Progress
    photos: str | None = None
    num_samples: int = 200
    sampling: Sampling = Sampling()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of a task: values of its metrics by name, a sheet of images, the number of samples, the time."""

    name: str
    title: str
    config: str
    run: str
    num_samples: int
    figures: dict[str, Figures]
    sheet: Path
    minutes: float


def chosen_names(wanted: Sequence[str] | None, photos: str | None) -> list[str]:
    """Return the tasks to do, all possible ones by default. UserError for unknown ones, and without photos needed."""
    if wanted is None:
        if not photos:
            _log.info("without photos: leaving out %s", ", ".join(sorted(NEED_PHOTOS)))
        return [name for name in NAMES if photos or name not in NEED_PHOTOS]
    if unknown := sorted(set(wanted) - set(NAMES)):
        raise UserError(f"tasks {','.join(unknown)}: unknown; choose from {','.join(NAMES)}")
    lacking = NEED_PHOTOS.intersection(wanted)
    if lacking and not photos:
        raise UserError(f"tasks {','.join(sorted(lacking))}: give photos, a folder with train/ and val/")
    return list(wanted)


def run_tasks(names: Sequence[str], runs: Mapping[str, str], jobs: int, settings: Settings) -> None:
    """Train the tasks and first stages that have no run yet, `jobs` at a time, measure the tasks, and write the page.

    runs: finished runs by the name of the task or first stage.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    runs = dict(runs)
    stages = sorted({FIRST_STAGES[name] for name in names if name not in runs} - set(runs))
    done: dict[str, Outcome] = {}
    with _processes(jobs) as pool:
        ready = [name for name in names if FIRST_STAGES[name] not in stages or name in runs]
        pending = {pool.submit(_train_first_stage, stage, settings): stage for stage in stages}
        while pending or ready:
            pending |= {pool.submit(_do_task, name, runs, settings): name for name in ready}
            future = next(as_completed(pending))
            finished, ready = pending.pop(future), []
            if finished in stages:
                runs[finished] = future.result()
                ready = [name for name in names if FIRST_STAGES[name] == finished and name not in runs]
            else:
                done[finished] = future.result()
                _write_results(settings.folder, [done[name] for name in names if name in done])
    _log.info("see %s", settings.folder / "report.html")


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Divide the cores among processes that train at the same time; a failure, SIGTERM or Ctrl-C stops them all.

    Trainings that are stopped save a checkpoint first.
    """
    share = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _begin_process, (share, multiprocessing.get_start_method())
    )
    try:
        with stopped_by_sigterm():
            yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process(num_threads: int, start_method: str) -> None:
    """Limit the threads of a process, and start its data workers like those of any training: spawned ones are slow."""
    torch.set_num_threads(num_threads)
    multiprocessing.set_start_method(start_method, force=True)


def _train_first_stage(stage: str, settings: Settings) -> str:
    """Train an autoencoder that several tasks use, and return its run folder."""
    _prefix_logs(stage)
    overrides = [*_photo_overrides(stage, settings.photos), *settings.overrides]
    return str(train_config(CONFIGS / f"{stage}.yaml", settings.folder / "logs", overrides, f"the first stage {stage}"))


def _do_task(name: str, runs: Mapping[str, str], settings: Settings) -> Outcome:
    """Train a task, unless a finished run is given, and measure it."""
    _prefix_logs(name)
    start, task = time.monotonic(), _task(name)
    run = Path(runs[name]) if name in runs else _train(task, runs[FIRST_STAGES[name]], settings)
    count, figures, sheet = _measure(name, task, run, settings)
    minutes = (time.monotonic() - start) / 60
    return Outcome(name, task.title, task.config, str(run), count, figures, sheet, minutes)


def _prefix_logs(name: str) -> None:
    """Put a name before each message of this process, as several log at the same time."""
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("ldm").setLevel(logging.INFO)


def _task(name: str) -> Task:
    """Return a task by its name; the classifier of digits is trained first."""
    if name != "class":
        return (scene_tasks() | photo_tasks())[name]
    _log.info("training the classifier that recognises the digits")
    items = collate([item for item in Digits(size=32, split="train")])
    return digit_task(digit_classifier(items["image"], items["class_label"]))


def _train(task: Task, first_stage: str, settings: Settings) -> Path:
    weights = f"model.params.autoencoder.checkpoint={first_stage}"
    overrides = [weights, *_photo_overrides(task.config, settings.photos), *settings.overrides]
    return train_config(CONFIGS / f"{task.config}.yaml", settings.folder / "logs", overrides, task.title)


def _photo_overrides(name: str, photos: str | None) -> list[str]:
    """Return the overrides with the folders of photos, for the configs that read photos."""
    if not name.endswith("_photos"):
        return []
    inner = "params" if name.startswith("autoencoder") else "params.dataset.params"
    folders = {"train": "train", "validation": "val"}
    return [f"data.params.{split}.{inner}.root={photos}/{folder}" for split, folder in folders.items()]


def _measure(name: str, task: Task, run: Path, settings: Settings) -> tuple[int, dict[str, Figures], Path]:
    """Sample with the conditions of validation items; return their number, the values and a sheet of images."""
    loaded = load_run(run, settings.device)
    batch = _validation_items(loaded, settings.num_samples)
    conditions, size = {key: batch[key] for key in task.keys}, tuple(batch["image"].shape[2:])
    sampling = replace(settings.sampling, scale=task.scale)
    images = task.finished(sample_all(loaded.model, conditions, size, sampling, settings.progress), batch)
    words = batch.get("caption") or [str(int(label)) for label in batch.get("class_label", [])]
    drawn = condition_images(task, batch)
    shown = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_SHOWN].tolist()  # not by eye
    rows = [images[shown], batch["image"][shown]]
    titles = [f"sample: {words[i]}" if drawn is None else "sample" for i in shown] + ["real"] * len(shown)
    if drawn is not None:
        rows, titles = [drawn[shown], *rows], ["condition"] * len(shown) + titles
    sheet = settings.folder / f"{name}.png"
    image_sheet(torch.cat(rows), titles, sheet, columns=len(shown))
    return len(images), task.figures(images, batch), sheet


def _validation_items(loaded: LoadedModel, count: int) -> dict[str, Any]:
    """Return validation items of the data that a model was trained with, evenly spaced, as one batch; at most all."""
    dataset = config.instantiate(loaded.content["data"]["params"]["validation"], "data.params.validation")
    if len(dataset) < count:
        _log.warning("num_samples %d: the validation set has %d items; all are used", count, len(dataset))
    count = min(count, len(dataset))
    return collate([dataset[i * len(dataset) // count] for i in range(count)])  # some data sets are sorted by class


def _write_results(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the page and the values of the tasks done so far."""
    sections = [overview(outcomes), *map(section, outcomes)]
    write_page(folder / "report.html", "Every task of the paper, as a toy", sections)
    written = ("figures", "minutes", "run", "num_samples")
    content = {outcome.name: {key: getattr(outcome, key) for key in written} for outcome in outcomes}
    (folder / "figures.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def section(outcome: Outcome) -> Section:
    """Return the section of one task."""
    rows = [("measure", "right conditions", "shuffled conditions")]
    rows += [_row(*entry) for entry in outcome.figures.items()]
    text = f"configs/demo/{outcome.config}.yaml, {outcome.minutes:.1f} minutes"
    return Section(outcome.title, text, rows, [outcome.sheet])


def overview(outcomes: Sequence[Outcome]) -> Section:
    """Return the table of all tasks."""
    rows: list[tuple[str, ...]] = [("task", "measure", "right conditions", "shuffled conditions")]
    for outcome in outcomes:
        rows += [(outcome.title, *_row(*entry)) for entry in outcome.figures.items()]
    text = "Shuffled: the same images, compared with the conditions of other images. A reference has one value."
    return Section("Metrics", text, rows)


def _row(name: str, figures: Figures) -> tuple[str, str, str]:
    shown = {key: f"{value:.3g}" for key, value in figures.items()}
    return name, shown.get("right", shown.get("reference", "")), shown.get("shuffled", "")
