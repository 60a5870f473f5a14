"""Look at data, first stage, config or plan before GPU time is spent; exit status 1 if something is wrong.

    ldm doctor data --base configs/own/folder.yaml data.params.train.params.root=IMAGES
    ldm doctor first-stage --run logs/RUN --indir IMAGES
    ldm doctor config ldm/ffhq ldm/celebahq
    ldm doctor plan --base ldm/ffhq --gpus 8 --card H100 --price 2.50

Each prints its report, and with --html FILE writes it as one page that needs no other file. Any further
dotted.key=value overrides the config.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm import compat
from ldm.cli.arguments import BASE, CARD, Arguments, TaskParser, add_plan_arguments, parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import (
    add_model_arguments,
    add_side_arguments,
    choose_device,
    model_source,
    progress,
)
from ldm.cli.train import plan_of
from ldm.config import trust_base
from ldm.doctor.check_data import examine_data
from ldm.doctor.config import config_file, examine_config
from ldm.doctor.finding import Finding
from ldm.doctor.first_stage import examine_first_stage, images_for, released
from ldm.doctor.plan import Assumptions, examine_plan
from ldm.errors import UserError
from ldm.evaluation.report import pyplot, write_page
from ldm.models.loading import load_first_stage

Examine = Callable[[argparse.Namespace], Iterator[Finding]]
_OUTDIR = {"default": Path("outputs/doctor"), "type": Path, "metavar": "DIR"}
_MFU = 0.2


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Examine, print each finding when it is made, and write the page."""
    given = parse_with_overrides(_parser(), argv)
    _check_page(given.html)
    found: list[Finding] = []
    try:
        for finding in given.examine(given):
            found.append(finding)
            sys.stdout.write(f"{finding.plain()}\n")
    finally:
        if given.html is not None and found:
            with _writing(given.html):
                write_page(given.html, f"ldm doctor {given.what}", found)
    problems = [problem for finding in found for problem in finding.problems]
    if problems:
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)}, see above; first {problems[0]}")


def _parser() -> TaskParser:
    parser = TaskParser("doctor", __doc__)
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=_part)

    def kind(name: str, text: str, examine: Examine) -> argparse.ArgumentParser:
        part = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        part.set_defaults(examine=examine)
        part.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page, too")
        return part

    data = kind("data", "what a run would read: counts, duplicates, labels, captions, what the network sees", _data)
    add = data.add_argument
    add("-b", "--base", **BASE, nargs="+", required=True)
    add("-n", "--num", type=int, default=256, help="items to read of each set, evenly spread; 0 for all (default 256)")
    add("-l", "--outdir", **_OUTDIR, help="where the sheets of items go (default outputs/doctor)")

    stage = kind("first-stage", "whether an autoencoder is good enough for your images", _first_stage)
    add = stage.add_argument
    add("--indir", required=True, metavar="DIR", help="folder of images")
    add("-n", "--num", type=int, default=64, help="images to read, evenly spread; 0 for all (default 64)")
    add("-l", "--outdir", **_OUTDIR, help="where the images of the report go (default outputs/doctor)")
    add_model_arguments(stage)
    add_side_arguments(stage)
    add("--device", default="auto", help="auto, cpu, or a device as torch names it")

    config = kind("config", "mistakes in a config, what has no effect in it, and how it differs from another", _config)
    config.add_argument("name", metavar="YAML", help="file, shipped name or run folder")
    config.add_argument("other", nargs="?", metavar="YAML", help="what it is compared with")

    plan = kind("plan", "memory, work, time and price of a training on a card, without data or devices", _plan)
    add_plan_arguments(plan)
    add = plan.add_argument
    add("--card", required=True, **CARD, help="memory in GiB, or a name: A100, H100 ...")
    add("--mfu", type=float, default=_MFU, help=f"share of its peak that is assumed to be reached (default {_MFU})")
    add("--tflops", type=float, help="peak of the card in TFLOP/s (default: of its data sheet)")
    add("--price", type=float, metavar="AMOUNT", help="of a card for an hour, in any currency")
    return parser


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from error


def _check_page(path: Path | None) -> None:
    """Make the folder of the page before anything long. UserError if it cannot be written there."""
    if path is not None and path.is_dir():
        raise UserError(f"--html {path}: is a folder; name a file in it")
    if path is not None:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)


def _part(prog: str, description: str, **_: Any) -> TaskParser:
    return TaskParser(prog.removeprefix("ldm "), description)


def _data(given: argparse.Namespace) -> Iterator[Finding]:
    trust_base(given.base, given.overrides)
    config = OmegaConf.to_container(compat.load(given.base, given.overrides), resolve=True)
    return examine_data(config, _count(given.num), given.outdir, progress)


def _first_stage(given: argparse.Namespace) -> Iterator[Finding]:
    if given.overrides:
        raise UserError(f"{given.overrides[0]}: a first stage is as it was trained; leave it out")
    if given.html is not None:
        pyplot()  # before anything long
    num, device = _count(given.num), choose_device(given.device)
    loaded = load_first_stage(model_source(given), device)
    others = {name: load_first_stage(source, device) for name, source in released().items()}
    stages = {str(loaded.checkpoint): loaded.autoencoder}
    images = images_for(loaded, given.indir, num or None, (given.H, given.W))
    stages |= {name: other.autoencoder for name, other in others.items() if other.checkpoint != loaded.checkpoint}
    return examine_first_stage(stages, images, given.outdir, progress, draws=given.html is not None)


def _config(given: argparse.Namespace) -> Iterator[Finding]:
    if not Path(given.name).is_dir():  # of a run it may be a stranger's
        trust_base([config_file(given.name)], given.overrides)
    return examine_config(given.name, given.overrides, given.other)


def _plan(given: argparse.Namespace) -> Iterator[Finding]:
    unused = {"train": False, "no_test": True, "debug": False, "dry_run": True}
    values = vars(given) | unused
    arguments = Arguments(**{field.name: values[field.name] for field in fields(Arguments)})
    return examine_plan(plan_of(arguments), given.card, Assumptions(given.mfu, given.tflops, given.price))


def _count(num: int) -> int:
    if num < 0:
        raise UserError(f"--num {num}: use 1 or more, or 0 for all")
    return num
