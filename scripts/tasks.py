"""Train a toy of every conditional task of the paper, and measure whether its pictures follow the condition.

    python scripts/tasks.py                               text, layout, semantic map, retrieval
    python scripts/tasks.py --photos DIR                  class, super-resolution, inpainting too: DIR/train, DIR/val
    python scripts/tasks.py --tasks layout,semantic       some of them
    python scripts/tasks.py --run layout=logs/RUN         measure a finished run instead of training; can be repeated

The page outputs/tasks/report.html has a row a task: conditions, samples, and each figure with the right conditions and
with those of other pictures.
"""

import argparse
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm import config
from ldm.cli.arguments import parse_with_overrides
from ldm.cli.common import choose_device, main_guard, progress
from ldm.data.core.loader import collate
from ldm.errors import UserError
from ldm.evaluation.report import Section, picture_sheet, write_page
from ldm.models.generate import Request, generate
from ldm.models.loading import LoadedModel, load_model
from ldm.sampling.ddim import DDIM
from ldm.toy.digit_classifier import digit_classifier
from ldm.toy.digits import Digits
from ldm.toy.tasks import Figures, Task, condition_pictures, digit_task, photo_tasks, scene_tasks
from ldm.training.stages import stopped_by_sigterm, train_config

_log = logging.getLogger("ldm.tasks")
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
FIRST_STAGES = {
    **dict.fromkeys(("text", "layout", "semantic", "retrieval"), "autoencoder_shapes"),
    **dict.fromkeys(("class", "superres", "inpainting"), "autoencoder_photos"),
}
NAMES = tuple(FIRST_STAGES)
NEED_PHOTOS = {name for name, stage in FIRST_STAGES.items() if stage == "autoencoder_photos"}
SHOWN = 8


class Outcome(NamedTuple):
    """Hold what is told of a task: its figures by name, the sheet of pictures, the number of pictures, the time."""

    name: str
    title: str
    config: str
    run: str
    num_samples: int
    figures: dict[str, Figures]
    sheet: Path
    minutes: float


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, judge each task, and write the page."""
    options = parse(argv)
    folder = Path(options.outdir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = dict(entry.split("=", 1) for entry in options.run)
    names = chosen_names(options)
    stages = sorted({FIRST_STAGES[name] for name in names if name not in runs} - set(runs))
    done: dict[str, Outcome] = {}
    with processes(options.jobs) as pool:
        ready = [name for name in names if FIRST_STAGES[name] not in stages or name in runs]
        pending = {pool.submit(train_first_stage, stage, options): stage for stage in stages}
        while pending or ready:
            pending |= {pool.submit(do_task, name, runs, options): name for name in ready}
            future = next(as_completed(pending))
            finished, ready = pending.pop(future), []
            if finished in stages:
                runs[finished] = future.result()
                ready = [name for name in names if FIRST_STAGES[name] == finished and name not in runs]
            else:
                done[finished] = future.result()
                write_results(folder, [done[name] for name in names if name in done])
    _log.info("see %s", folder / "report.html")


class InThisProcess(Executor):
    """Does everything as it is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future:
        """Return the finished future."""
        future: Future = Future()
        future.set_result(function(*args))
        return future


@contextmanager
def processes(jobs: int) -> Iterator[Executor]:
    """Share the cores out among processes that train at the same time; a failure, SIGTERM or Ctrl-C stops them all.

    Trainings that are stopped have saved where they stand.
    """
    if jobs == 0:
        yield InThisProcess()
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, torch.set_num_threads, (max(1, torch.get_num_threads() // jobs),))
    try:
        with stopped_by_sigterm():
            yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def train_first_stage(stage: str, options: argparse.Namespace) -> str:
    """Train an autoencoder that tasks share, and return its run folder."""
    speak_as(stage)
    given = [*photo_paths(stage, options.photos), *options.overrides]
    logs = Path(options.outdir) / "logs"
    return str(train_config(CONFIGS / f"{stage}.yaml", logs, given, f"the first stage {stage}"))


def do_task(name: str, runs: Mapping[str, str], options: argparse.Namespace) -> Outcome:
    """Train a task, unless a finished run is given, and judge it."""
    speak_as(name)
    start = time.monotonic()
    task = describe(name)
    run = Path(runs[name]) if name in runs else trained(task, runs[FIRST_STAGES[name]], options)
    count, table, sheet = judge(name, task, run, options)
    minutes = (time.monotonic() - start) / 60
    return Outcome(name, task.title, task.config, str(run), count, table, sheet, minutes)


def speak_as(name: str) -> None:
    """Put a name before each message of this process, as several speak at the same time."""
    logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("ldm").setLevel(logging.INFO)


def write_results(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the page and the figures of the tasks done so far."""
    sections = [overview(outcomes), *map(section, outcomes)]
    write_page(folder / "report.html", "Every task of the paper, as a toy", sections)
    told = ("figures", "minutes", "run", "num_samples")
    content = {outcome.name: {key: getattr(outcome, key) for key in told} for outcome in outcomes}
    (folder / "figures.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(NAMES)
    parser.add_argument("--tasks", type=lambda text: text.split(","), help=f"of {every}; default: all possible")
    parser.add_argument("--photos", metavar="DIR", help="folder with train/ and val/ of photos")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=RUN", help="a finished run of any stage")
    parser.add_argument("--outdir", default="outputs/tasks")
    parser.add_argument("--num-samples", type=int, default=200, help="validation items to judge a task by")
    parser.add_argument("--ddim_steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: 2 on a CPU, else 1); 0: in this process")
    parser.epilog = "Any further dotted.key=value overrides the configs of all trainings."
    options = parse_with_overrides(parser, argv)
    unknown = set(options.tasks or ()) - set(NAMES)
    if unknown:
        raise UserError(f"--tasks {','.join(sorted(unknown))}: unknown; choose from {every}")
    if any("=" not in entry for entry in options.run):
        raise UserError("--run: write NAME=RUN, for example layout=logs/2026-01-01T00-00-00_layout_shapes")
    if options.jobs is None:
        options.jobs = 2 if choose_device(options.device).type == "cpu" and torch.get_num_threads() > 1 else 1
    return options


def chosen_names(options: argparse.Namespace) -> list[str]:
    """List the tasks to do. UserError where photos are needed and not given."""
    if options.tasks is None:
        if not options.photos:
            _log.info("without --photos DIR: leaving out %s", ", ".join(sorted(NEED_PHOTOS)))
        return [name for name in NAMES if options.photos or name not in NEED_PHOTOS]
    lacking = NEED_PHOTOS.intersection(options.tasks)
    if lacking and not options.photos:
        raise UserError(f"--tasks {','.join(sorted(lacking))}: give --photos DIR, a folder with train/ and val/")
    return options.tasks


def describe(name: str) -> Task:
    """Find a task by its name; the judge of digits is trained on the spot."""
    if name != "class":
        return (scene_tasks() | photo_tasks())[name]
    _log.info("training the classifier that judges the digits")
    items = collate([item for item in Digits(size=32, split="train")])
    return digit_task(digit_classifier(items["image"], items["class_label"]))


def trained(task: Task, first_stage: str, options: argparse.Namespace) -> Path:
    """Train a task on a first stage and return the run folder."""
    weights = f"model.params.autoencoder.checkpoint={first_stage}"
    given = [weights, *photo_paths(task.config, options.photos), *options.overrides]
    return train_config(CONFIGS / f"{task.config}.yaml", Path(options.outdir) / "logs", given, task.title)


def photo_paths(name: str, photos: str | None) -> list[str]:
    """Return the overrides that say where the photos are, for the configs that read photos."""
    if not name.endswith("_photos"):
        return []
    inner = "params" if name.startswith("autoencoder") else "params.dataset.params"
    folders = {"train": "train", "validation": "val"}
    return [f"data.params.{split}.{inner}.root={photos}/{folder}" for split, folder in folders.items()]


def judge(name: str, task: Task, run: Path, options: argparse.Namespace) -> tuple[int, dict[str, Figures], Path]:
    """Draw from the conditions of validation items; return their number, the figures and a sheet of pictures."""
    loaded = load_model(run, choose_device(options.device))
    batch = validation_items(loaded, options.num_samples)
    images = task.finished(draw(loaded, task, batch, options), batch)
    words = batch.get("caption") or [str(int(label)) for label in batch.get("class_label", [])]
    conditions = condition_pictures(task, batch)
    shown = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:SHOWN].tolist()  # not by eye
    rows = [images[shown], batch["image"][shown]]
    titles = [f"sample: {words[i]}" if conditions is None else "sample" for i in shown] + ["real"] * len(shown)
    if conditions is not None:
        rows, titles = [conditions[shown], *rows], ["condition"] * len(shown) + titles
    sheet = Path(options.outdir) / f"{name}.png"
    picture_sheet(torch.cat(rows), titles, sheet, columns=len(shown))
    return len(images), task.figures(images, batch), sheet


def validation_items(loaded: LoadedModel, count: int) -> dict[str, Any]:
    """Read validation items of the data that a model was trained with, spread over all of them.

    All are read if there are fewer than `count`.
    """
    dataset = config.instantiate(loaded.content["data"]["params"]["validation"], "data.params.validation")
    if len(dataset) < count:
        _log.warning("--num-samples %d: the validation set has %d items; all are used", count, len(dataset))
    count = min(count, len(dataset))
    return collate([dataset[i * len(dataset) // count] for i in range(count)])  # some data sets are sorted by class


def draw(loaded: LoadedModel, task: Task, batch: dict[str, Any], options: argparse.Namespace) -> Tensor:
    """Draw one picture for each item."""
    conditions = {key: batch[key] for key in task.keys}
    size = tuple(batch["image"].shape[2:])
    count = len(batch["image"])
    request = Request(range(count), size, conditions, task.scale, options.batch_size)
    with progress(-(-count // options.batch_size) * options.ddim_steps, task.title) as bar:
        drawn = generate(loaded.model, DDIM(options.ddim_steps), request, lambda step: bar.update())
        return torch.cat([part.images for part in drawn]).clamp(-1, 1).cpu()


def section(outcome: Outcome) -> Section:
    """Make the part of the page that shows one task."""
    rows = [("measure", "right conditions", "shuffled conditions")]
    rows += [_row(*entry) for entry in outcome.figures.items()]
    text = f"configs/demo/{outcome.config}.yaml, {outcome.minutes:.1f} minutes"
    return Section(outcome.title, text, rows, [outcome.sheet])


def overview(outcomes: Sequence[Outcome]) -> Section:
    """Make the table of all tasks."""
    rows: list[tuple[str, ...]] = [("task", "measure", "right conditions", "shuffled conditions")]
    for outcome in outcomes:
        rows += [(outcome.title, *_row(*entry)) for entry in outcome.figures.items()]
    text = "Shuffled: the same pictures, held against the conditions of other pictures. A reference has one figure."
    return Section("Figures", text, rows)


def _row(name: str, figures: Figures) -> tuple[str, str, str]:
    shown = {key: f"{value:.3g}" for key, value in figures.items()}
    return name, shown.get("right", shown.get("reference", "")), shown.get("shuffled", "")


if __name__ == "__main__":
    main()
