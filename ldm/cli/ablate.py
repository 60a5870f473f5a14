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

from ldm.ablation import tables
from ldm.ablation.report import write_report
from ldm.ablation.resolve import Resolved, check_ready, resolve
from ldm.ablation.run import device_slots, run_trials, share, step_names
from ldm.ablation.study import Study, read
from ldm.ablation.workspace import Workspace
from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.config import shipped

_log = logging.getLogger(__name__)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Resolve and check the whole study before anything is trained; then run and report it."""
    options = parse(argv)
    study = read(options.study).changed(options.overrides)
    if options.seeds:
        study = replace(study, seeds=tuple(options.seeds))
    trials = resolve(study)
    if options.dry_run:
        show(study, trials)
        return
    workspace = Workspace(Path(options.out or f"outputs/ablation/{study.name}").resolve())
    if options.report:
        _log.info("see %s", write_report(study, trials, workspace))
        return
    mine = trials if options.task is None else share(trials, options.task, options.of)
    slots = device_slots(options.devices, options.workers, study.workers)
    check_ready(study, trials)
    try:
        run_trials(study, mine, workspace, slots)
    finally:
        _log.info("see %s", write_report(study, trials, workspace))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = TaskParser("ablate", __doc__)
    add = parser.add_argument
    add("study", type=lambda name: Path(shipped.find(name)), metavar="STUDY", help="a YAML or a name: ablation/toy_f")
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


def show(study: Study, trials: Sequence[Resolved]) -> None:
    """Print the first stages, a row for each trial, and how much is to be done."""
    stages = {trial.first_stage.name: trial.first_stage for trial in trials if trial.first_stage is not None}
    for stage in stages.values():
        if stage.checkpoint is None:
            steps = stage.content["lightning"]["trainer"]["max_steps"]
            sys.stdout.write(f"first stage {stage.name}: {steps:,} steps\n")
    for row in tables.as_text([tables.size(trial) for trial in trials]):
        sys.stdout.write("  ".join(row) + "\n")
    number = len({name for trial in trials for name in step_names(study, trial)})
    is_given = all(trial.checkpoint is not None for trial in trials)
    budget = "no training" if is_given else f"every latent training: {study.budget.amount:g} {study.budget.kind}"
    sys.stdout.write(f"{number} jobs; {budget}\n")
