"""Train from the command line: python main.py --base A.yaml [B.yaml ...] -t [flags] [dotted.key=value ...]."""

from __future__ import annotations

import pdb
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml

from ldm import compat
from ldm.allowance import lies_in
from ldm.cli.arguments import LOGS, Arguments, parse
from ldm.cli.entry import main_guard
from ldm.config import trust_base
from ldm.distributed import is_first_process
from ldm.errors import UserError
from ldm.training.cards import Card
from ldm.training.lightning_fixes.signals import Stopped
from ldm.training.plan import MISSING, Plan, RunOptions, make_plan
from ldm.training.resumption import tell_edits
from ldm.training.run import build_without_memory, cost_of, describe, first_stage_problem, train_plan
from ldm.training.run_folder import AUTO, RunFolder, choose_run

_OF_TRAINER = ("gpus", "devices", "accelerator", "num_nodes", "strategy", "precision", "max_steps")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Train, or with --dry-run print what would be trained; a run that was asked to stop has ended well."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    plan = plan_of(arguments)
    if arguments.dry_run:
        return dry_run(plan, arguments.card)
    if not arguments.train:
        raise UserError("nothing to do: add -t to train, or --dry-run to see what would be trained")
    try:
        train_plan(plan, test=not arguments.no_test)
    except Stopped:
        return  # the message with the command that goes on is in the log
    except Exception as error:
        if arguments.debug and is_first_process() and not isinstance(error, UserError):
            pdb.post_mortem()
        raise


def plan_of(arguments: Arguments) -> Plan:
    """Return the plan of a command line. Writes nothing. Raises UserError."""
    if arguments.name and arguments.resume and arguments.resume != AUTO:
        raise UserError("--name and --resume: a run that goes on keeps its name; drop --name")
    for override in arguments.overrides:
        section, _, flag = override.partition("=")[0].rpartition(".")
        if section == "lightning.trainer" and flag in _OF_TRAINER and getattr(arguments, flag) is not None:
            raise UserError(f"--{flag} and {override}: give one of them")
    name = arguments.name or (Path(arguments.base[0]).stem if arguments.base else "")
    run = choose_run(arguments.logdir, name, arguments.postfix, arguments.resume)
    is_named = arguments.resume not in ("", AUTO)
    is_elsewhere = arguments.logdir != LOGS and not lies_in(run.path, arguments.logdir)
    if is_named and (arguments.postfix or is_elsewhere):
        flag = "--postfix" if arguments.postfix else "--logdir"
        raise UserError(f"{flag} and --resume: a run that goes on keeps its folder; drop {flag}")
    trust_base(arguments.base, arguments.overrides if arguments.base else ())
    options = RunOptions(**{field.name: getattr(arguments, field.name) for field in fields(RunOptions)})

    def planned(files: list[str]) -> Plan:
        config = compat.load(files, arguments.overrides)
        return make_plan(config, run, arguments.seed, options, needs_data=not arguments.dry_run)

    plan = planned(config_files(arguments, run))
    if arguments.resume == AUTO and arguments.base and not run.is_new:
        tell_edits(plan, lambda: planned(arguments.base))
    return plan


def config_files(arguments: Arguments, run: RunFolder) -> list[str]:
    """Return the configs of a run: a resumed run's own, then those of the command line.

    `--resume auto` uses only the run's own config, because its command line repeats the one of the first start.
    """
    if not run.is_new:
        return [str(run.saved_config), *(arguments.base if arguments.resume != AUTO else [])]
    if not arguments.base:
        raise UserError("--base: name at least one config, e.g. --base configs/ldm/txt2img.yaml")
    return arguments.base


def dry_run(plan: Plan, card: Card | None) -> None:
    """Print the resolved config and what it amounts to. Needs no data, devices or weights but a guide's."""
    model = build_without_memory(plan)
    sys.stdout.write(yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True))
    for line in [*describe(plan, model), *([] if card is None else cost_of(plan, model, card.memory))]:
        sys.stdout.write(f"# {line}\n")
    if problem := first_stage_problem(plan) or ("" if "data" in plan.config else f"data: {MISSING}"):
        sys.stdout.write(f"# training would stop here: {problem}\n")
