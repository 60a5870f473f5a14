"""Check the data of a config, and draw what the network will see, before a run costs anything.

    ldm check-data --base configs/own/folder.yaml data.params.train.params.root=PHOTOS
    ldm check-data --base configs/ldm/txt2img.yaml --num 0 --outdir outputs/check_data

Any further dotted.key=value overrides the configs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import Dataset

from ldm import compat
from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser, progress
from ldm.config import instantiate, trust_base
from ldm.config.nodes import without_checkpoints
from ldm.doctor.check_data import check_dataset, num_to_read
from ldm.errors import UserError
from ldm.training.run import instantiate_training


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Check the data sets of a config; exit status 1 if something is wrong with them."""
    parser = TaskParser("check-data", __doc__)
    add = parser.add_argument
    add("-b", "--base", nargs="+", required=True, metavar="YAML", help="config files, merged left to right")
    add("-n", "--num", type=int, default=256, help="items to read of each set, evenly spread; 0 for all (default 256)")
    add("-l", "--outdir", default="outputs/check_data", help="where the sheets of items go")
    options = parse_with_overrides(parser, argv)
    if options.num < 0:
        raise UserError(f"--num {options.num}: use 1 or more, or 0 for all")
    trust_base(options.base, options.overrides)
    config = OmegaConf.to_container(compat.load(options.base, options.overrides), resolve=True)
    if "data" not in config:
        raise UserError(f"{', '.join(options.base)}: there is no section data")
    data, model = instantiate(config["data"], "data"), _model(config)
    problems: list[str] = []
    for name in ("train", "validation", "test"):
        dataset = getattr(data, name, None)
        if dataset is not None:
            problems += _check(dataset, name, options.num, Path(options.outdir), model)
    if problems:
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)}, see above; first {problems[0]}")


def _model(config: Mapping[str, Any]) -> nn.Module | None:
    """Build the training of a config, or its model alone, without memory and without weights."""
    if "model" not in config:
        return None
    bare = without_checkpoints(config)
    with torch.device("meta"):
        return instantiate_training(bare) if "training" in bare else instantiate(bare["model"], "model")


def _check(dataset: Dataset, name: str, num: int, outdir: Path, model: nn.Module | None) -> list[str]:
    """Print the report on a data set, write its sheet, and return its problems."""
    with progress(num_to_read(dataset, num), name) as bar:
        try:
            report = check_dataset(dataset, num, model, bar.update)
        except UserError as error:
            raise UserError(f"data.params.{name}: {error}") from error
    outdir.mkdir(parents=True, exist_ok=True)
    report.sheet.save(outdir / f"{name}.png")
    problems = [f"{name}: {problem}" for problem in report.problems]
    lines = [f"{name}: {report.lines[0]}", *report.lines[1:], *(f"  PROBLEM {problem}" for problem in problems)]
    sys.stdout.write("\n".join([*lines, f"  see {outdir / name}.png"]) + "\n")
    return problems
