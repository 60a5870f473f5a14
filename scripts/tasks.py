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
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import config
from ldm.cli.common import choose_device, main_guard, progress
from ldm.cli.models import LoadedModel, load_model
from ldm.cli.stages import train_config
from ldm.data.digits import Digits
from ldm.data.loader import collate
from ldm.errors import UserError
from ldm.evaluation.digit_classifier import digit_classifier
from ldm.evaluation.generate import Request, generate
from ldm.evaluation.report import Section, picture_sheet, write_page
from ldm.evaluation.tasks import Figures, Task, condition_pictures, digit_task, photo_tasks, scene_tasks
from ldm.sampling.ddim import DDIM

_log = logging.getLogger("ldm.tasks")
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"
NAMES = ("text", "layout", "semantic", "retrieval", "class", "superres", "inpainting")
NEED_PHOTOS = {"superres", "inpainting", "class"}  # class: its first stage is that of the photos
SHOWN = 8


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, judge each task, and write the page."""
    options = parse(argv)
    folder = Path(options.outdir)
    folder.mkdir(parents=True, exist_ok=True)
    runs = dict(entry.split("=", 1) for entry in options.run)
    chosen = {name: describe(name) for name in chosen_names(options)}
    results, sections = {}, []
    for name, task in chosen.items():
        start = time.monotonic()
        run = Path(runs[name]) if name in runs else trained(name, task, runs, options)
        count, table, sheet = judge(name, task, run, options)
        minutes = (time.monotonic() - start) / 60
        results[name] = {"figures": table, "minutes": minutes, "run": str(run), "num_samples": count}
        sections.append(section(task, table, sheet, minutes))
        write_page(folder / "report.html", "Every task of the paper, as a toy", [overview(chosen, results), *sections])
        (folder / "figures.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _log.info("see %s", folder / "report.html")


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
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for all trainings")
    options = parser.parse_intermixed_args(argv)
    unknown = set(options.tasks or ()) - set(NAMES)
    if unknown:
        raise UserError(f"--tasks {','.join(sorted(unknown))}: unknown; choose from {every}")
    if any("=" not in entry for entry in options.run):
        raise UserError("--run: write NAME=RUN, for example layout=logs/2026-01-01T00-00-00_layout_shapes")
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


def trained(name: str, task: Task, runs: dict[str, str], options: argparse.Namespace) -> Path:
    """Train a task, before it the first stage that it shares with others, and return the run folder."""
    logs = Path(options.outdir) / "logs"
    if task.first_stage not in runs:
        given = [*photo_paths(task.first_stage, options.photos), *options.overrides]
        title = f"the first stage {task.first_stage}"
        runs[task.first_stage] = str(train_config(CONFIGS / f"{task.first_stage}.yaml", logs, given, title))
    weights = f"model.params.autoencoder.checkpoint={runs[task.first_stage]}"
    given = [weights, *photo_paths(task.config, options.photos), *options.overrides]
    return train_config(CONFIGS / f"{task.config}.yaml", logs, given, task.title)


def photo_paths(name: str, photos: str | None) -> list[str]:
    """Give the overrides that say where the photos are, for the configs that read photos."""
    if not name.endswith("_photos"):
        return []
    inner = "params" if name.startswith("autoencoder") else "params.dataset.params"
    folders = {"train": "train", "validation": "val"}
    return [f"data.params.{split}.{inner}.root={photos}/{folder}" for split, folder in folders.items()]


def judge(name: str, task: Task, run: Path, options: argparse.Namespace) -> tuple[int, dict[str, Figures], Path]:
    """Draw from the conditions of validation items; return their number, the figures and a sheet of pictures."""
    loaded = load_model(Namespace(run=str(run), config=None, ckpt=None, raw=False), choose_device(options.device))
    batch = validation_items(loaded, options.num_samples)
    images = task.finished(draw(loaded, task, batch, options), batch)
    words = batch.get("caption") or [str(int(label)) for label in batch.get("class_label", [])]
    conditions = condition_pictures(task, batch)
    shown = [i * len(images) // SHOWN for i in range(SHOWN)]
    rows = [images[shown], batch["image"][shown]]
    titles = [f"sample: {words[i]}" if conditions is None else "sample" for i in shown] + ["real"] * SHOWN
    if conditions is not None:
        rows, titles = [conditions[shown], *rows], ["condition"] * SHOWN + titles
    sheet = Path(options.outdir) / f"{name}.png"
    picture_sheet(torch.cat(rows), titles, sheet, columns=SHOWN)
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


def section(task: Task, table: dict[str, Figures], sheet: Path, minutes: float) -> Section:
    """Make the part of the page that shows one task."""
    rows = [("measure", "right conditions", "shuffled conditions"), *(_row(*entry) for entry in table.items())]
    return Section(task.title, f"configs/demo/{task.config}.yaml, {minutes:.1f} minutes", rows, [sheet])


def overview(tasks: dict[str, Task], results: dict[str, Any]) -> Section:
    """Make the table of all tasks."""
    rows: list[tuple[str, ...]] = [("task", "measure", "right conditions", "shuffled conditions")]
    for name, result in results.items():
        rows += [(tasks[name].title, *_row(*entry)) for entry in result["figures"].items()]
    text = "Shuffled: the same pictures, held against the conditions of other pictures. A reference has one figure."
    return Section("Figures", text, rows)


def _row(name: str, figures: Figures) -> tuple[str, str, str]:
    shown = {key: f"{value:.3g}" for key, value in figures.items()}
    return name, shown.get("right", shown.get("reference", "")), shown.get("shuffled", "")


if __name__ == "__main__":
    main()
