"""Run an ablation study: train, evaluate and report many models that differ in named axes.

    ldm ablate configs/ablation/toy_f.yaml                     all of it; run again to go on
    ldm ablate configs/ablation/imagenet_f.yaml --dry-run      what would be trained
    ldm ablate STUDY --devices 0,1,2,3                         a training at a time on each GPU
    ldm ablate STUDY --task $SLURM_ARRAY_TASK_ID --of 6        one part of it, of a job array
    ldm ablate STUDY --report                                  the report of what is finished

Everything goes to outputs/ablation/<study>/: run folders, evaluations, and for each list of seeds a report.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ldm.ablation import tables
from ldm.ablation.evaluate import check_ready
from ldm.ablation.plan import StudyPlan, plan
from ldm.ablation.report import write_report
from ldm.ablation.resolve import resolve
from ldm.ablation.runner import Runner
from ldm.ablation.study import read
from ldm.ablation.workspace import DeviceSlot, Workspace
from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.errors import UserError

_log = logging.getLogger(__name__)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Resolve and check the whole study before anything is trained; then run and report it."""
    options = parse(argv)
    study = read(options.study).changed(options.overrides)
    if options.seeds:
        study = replace(study, seeds=tuple(options.seeds))
    whole = plan(study, resolve(study))
    if options.dry_run:
        show(whole)
        return
    workspace = Workspace(Path(options.out or f"outputs/ablation/{study.name}").resolve())
    if options.report:
        _log.info("see %s", write_report(whole, workspace))
        return
    mine = whole if options.task is None else whole.part(options.task, options.of)
    slots = device_slots(options.devices, options.workers, study.workers)
    check_ready(study)
    try:
        Runner(workspace, slots).run(mine.jobs)
    finally:
        _log.info("see %s", write_report(whole, workspace))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = TaskParser("ablate", __doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY", help="a YAML of configs/ablation")
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], help="in place of the study's: 1,2,3")
    add("--out", metavar="DIR", help="default outputs/ablation/<study>")
    add("--devices", default="auto", help="auto, cpu, or GPUs by number: 0,1")
    add("--workers", type=int, help="jobs at a time on each device (default: the study's on the CPU, else 1)")
    add("--task", type=int, help="do part number TASK, from 0, of ...")
    add("--of", type=int, help="... so many")
    add("--dry-run", action="store_true", help="check the study, say what would be trained, and stop")
    add("--report", action="store_true", help="only write the report of what is finished")
    text = "for all trials: latent.data.params.train.params.root=DIR, first_stage.KEY=VALUE, sample.scale=3"
    add("overrides", nargs="*", metavar="KEY=VALUE", help=text)
    options = parser.parse_intermixed_args(argv)
    if (options.task is None) != (options.of is None):
        parser.error("--task and --of belong together")
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: use 1 or more")
    return options


def device_slots(devices: str, workers: int | None, cpu_workers: int) -> list[DeviceSlot]:
    """Return a slot for each job that may run at a time.

    Args:
        devices: auto, cpu, or GPUs by number as 0,1.
        workers: slots on each device; None means `cpu_workers` on the CPU, else one.

    Raises UserError for GPUs that this machine does not have.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if devices == "cpu" or (devices == "auto" and kind is None):
        return [DeviceSlot("cpu", (("accelerator", "cpu"),))] * (workers or cpu_workers)
    numbers = ["0"] if devices == "auto" else devices.split(",")
    present = [] if kind is None else list(map(str, range(torch.accelerator.device_count())))
    if not set(numbers) <= set(present):
        hint = "write auto, cpu, or numbers of them as 0,1"
        raise UserError(f"--devices {devices}: this machine has {len(present)} GPUs; {hint}")
    return [DeviceSlot(f"{kind.type}:{number}", (("gpus", f"{number},"),)) for number in numbers] * (workers or 1)


def show(whole: StudyPlan) -> None:
    """Print a row for each trial, and the first stages."""
    for stage in whole.first_stages:
        steps = stage.content["lightning"]["trainer"]["max_steps"]
        sys.stdout.write(f"first stage {stage.name}: {steps:,} steps\n")
    for row in tables.as_text(tables.sizes(whole)):
        sys.stdout.write("  ".join(row) + "\n")
    budget = whole.study.budget
    sys.stdout.write(f"{len(whole.jobs)} jobs; every latent training: {budget.amount:g} {budget.kind}\n")
