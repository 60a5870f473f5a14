"""Train a toy of every conditional task of the paper, and measure whether its samples follow the conditions.

    ldm tasks                               text, layout, semantic map, retrieval
    ldm tasks --photos DIR                  class, super-resolution, inpainting too: DIR/train, DIR/val
    ldm tasks --tasks layout,semantic       some of them
    ldm tasks --run layout=logs/RUN         measure a finished run instead of training; can be repeated

Any further dotted.key=value overrides the configs of all trainings.
outputs/tasks/report.html has a row a task: conditions, samples, and values with the right and with shuffled conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser, choose_device, progress
from ldm.errors import UserError
from ldm.toy.runs import Sampling
from ldm.toy.tasks import NAMES, Settings, chosen_names, run_tasks


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, measure each task, and write the page."""
    parser = TaskParser("tasks", __doc__)
    add = parser.add_argument
    add("--tasks", type=lambda text: text.split(","), help=f"of {','.join(NAMES)}; default: all possible")
    add("--photos", metavar="DIR", help="folder with train/ and val/ of photos")
    add("--run", action="append", default=[], metavar="NAME=RUN", help="a finished run of any stage")
    add("--outdir", type=Path, default=Path("outputs/tasks"))
    add("--num-samples", type=int, default=200, help="validation items to measure a task by")
    add("--ddim_steps", type=int, default=50)
    add("--batch-size", type=int, default=50)
    add("--device", default="auto")
    add("--jobs", type=int, help="trainings at a time (default: 2 on a CPU, else 1)")
    given = parse_with_overrides(parser, argv)
    if any("=" not in entry for entry in given.run):
        raise UserError("--run: write NAME=RUN, for example layout=logs/2026-01-01T00-00-00_layout_shapes")
    names, device = chosen_names(given.tasks, given.photos), choose_device(given.device)
    sampling = Sampling(given.ddim_steps, batch_size=given.batch_size)
    settings = Settings(
        given.outdir, device, progress, given.photos, given.num_samples, sampling, tuple(given.overrides)
    )
    default_jobs = 2 if device.type == "cpu" and torch.get_num_threads() > 1 else 1
    run_tasks(names, dict(entry.split("=", 1) for entry in given.run), given.jobs or default_jobs, settings)
