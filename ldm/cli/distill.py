"""Distil a latent diffusion model into one that draws in a few steps without guidance (arXiv 2310.04378).

    ldm distill --teacher logs/RUN --guidance 3
    ldm sample --run logs/STUDENT --sampler consistency --steps 2

The student is a run like others, with the data and the settings of its teacher but a twentieth of its learning rate,
which any dotted.key=value overrides, such as lightning.trainer.max_steps=2000. The command of main.py that does the
same is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.training.stages import distill


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Train the student."""
    parser = TaskParser("distill", __doc__)
    add = parser.add_argument
    add("-r", "--teacher", "--run", required=True, metavar="RUN", help="run folder, or a checkpoint in one")
    add("--guidance", "--scale", type=float, default=1.0, help="of the teacher, 1 is none (default 1)")
    add("--intervals", type=int, default=50, help="steps of the teacher's walk that are learned (default 50)")
    add("-n", "--name", default="student", help="name of the run, behind the time (default student)")
    add("-l", "--logdir", default="logs", type=Path, help="where run folders are made (default logs)")
    given = parse_with_overrides(parser, argv)
    distill(given.teacher, given.guidance, given.intervals, given.logdir, given.name, given.overrides)
