"""What a run would be fed, before it costs anything: counts, shapes, ranges, unreadable files, and a sheet of items.

Each key of the items is held against what it is defined to be: pictures in [-1, 1], masks of -1 and +1, maps of class
indices, boxes in [0, 1], one shape for all. The keys that the conditioners of the model read must be there, and sizes,
channels and class indices must go with the model.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ldm import compat
from ldm.cli.arguments import parse_with_overrides
from ldm.cli.common import main_guard, progress
from ldm.conditioning.base import Conditioner
from ldm.config import instantiate
from ldm.config.targets import find_target
from ldm.data.core.classes import class_names
from ldm.data.core.derived import source_of
from ldm.doctor.data_fit import fit_problems
from ldm.doctor.item_sheet import item_sheet
from ldm.doctor.summary import Summary
from ldm.errors import UserError

_SETS = ("train", "validation", "test")
_SHOWN = 16
_KEYS = ("key", "labels_key", "mask_key")  # parameters of conditioners that name what must be in a batch


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Check the data sets of a config; exit status 1 if something is wrong with them."""
    options = parse_with_overrides(_parser(), argv)
    if options.num < 0:
        raise UserError(f"--num {options.num}: use 1 or more, or 0 for all")
    config = OmegaConf.to_container(compat.load(options.base, options.overrides), resolve=True)
    if "data" not in config:
        raise UserError(f"{', '.join(options.base)}: there is no section data")
    data = instantiate(config["data"], "data")
    needs, problems = Needs.of(config.get("model")), []
    for name in _SETS:
        dataset = getattr(data, name, None)
        if dataset is not None:
            problems += check(dataset, name, options.num, Path(options.outdir), needs)
    if problems:
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)}, see above; first {problems[0]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check the data sets of a config, and draw what the network will see.",
        epilog="Any further dotted.key=value overrides the configs, e.g. data.params.train.params.root=PHOTOS.",
    )
    add = parser.add_argument
    add("-b", "--base", nargs="+", required=True, metavar="YAML", help="config files, merged left to right")
    add("-n", "--num", type=int, default=256, help="items to read of each set, evenly spread; 0 for all (default 256)")
    add("-l", "--outdir", default="outputs/check_data", help="where the sheets of items go")
    return parser


@dataclass(frozen=True)
class Needs:
    """What the model of a config asks of its data: `keys` with the places that read them, and the model, unweighted."""

    keys: Mapping[str, str]
    model: nn.Module | None = None

    @classmethod
    def of(cls, node: Any) -> Needs:
        """Read the section `model`, if there is one."""
        if node is None:
            return cls({})
        with torch.device("meta"):
            model = instantiate({key: node[key] for key in ("target", "params") if key in node}, "model")
        return cls(needed_keys(node), model)

    def problems(self, summary: Summary, dataset: Dataset) -> list[str]:
        """Say in a line each what a data set does not give that is asked for."""
        absent, have = [key for key in self.keys if key not in summary.keys], ", ".join(summary.keys)
        lacking = [f"{self.keys[key]} reads {key!r}, items have {have}" for key in absent]
        return lacking + ([] if self.model is None else fit_problems(self.model, summary, class_names(dataset)))


def check(dataset: Dataset, name: str, num: int, outdir: Path, needs: Needs) -> list[str]:
    """Report on a data set on stdout and draw `outdir`/`name`.png. Returns what is wrong, one line each."""
    summary, shown = Summary(), []
    total = _total(dataset, num)
    with progress(total, name) as bar:
        for item in _items(dataset, num):
            summary.add(item)
            shown += [item] if len(shown) < _SHOWN else []
            bar.update()
    if not summary.num_items:
        raise UserError(f"data.params.{name}: no item can be read")
    problems = [f"{name}: {problem}" for problem in [*summary.problems(), *needs.problems(summary, dataset)]]
    outdir.mkdir(parents=True, exist_ok=True)
    item_sheet(shown).save(outdir / f"{name}.png")
    lines = [_heading(dataset, name, summary.num_items), *summary.lines(), *_counts(dataset)]
    lines += [f"  PROBLEM {problem}" for problem in problems] + [f"  see {outdir / name}.png"]
    sys.stdout.write("\n".join(lines) + "\n")
    return problems


def _total(dataset: Dataset, num: int) -> int | None:
    if isinstance(dataset, IterableDataset):
        return num or None
    return min(num or len(dataset), len(dataset))


def _items(dataset: Dataset, num: int) -> Iterator[Mapping[str, Any]]:
    """Return items that are evenly spread over a data set, or the first ones of a stream."""
    if isinstance(dataset, IterableDataset):
        yield from islice(iter(dataset), num or None)
        return
    for index in np.unique(np.linspace(0, len(dataset) - 1, _total(dataset, num)).round().astype(int)).tolist():
        yield dataset[index]


def _heading(dataset: Dataset, name: str, num_items: int) -> str:
    amount = "a stream" if isinstance(dataset, IterableDataset) else f"{len(dataset):,} items"
    return f"{name}: {_source(dataset)}, {amount}, {num_items:,} read"


def _source(dataset: Dataset) -> str:
    source = source_of(dataset)
    inner = "" if source is dataset else f" of {type(source).__name__}"
    return f"{type(dataset).__name__}{inner}"


def _counts(dataset: Dataset) -> list[str]:
    source, names, lines = source_of(dataset), class_names(dataset), []
    for attribute, what in (("num_unreadable", "files cannot be read"), ("num_empty", "captions or masks are empty")):
        count = getattr(source, attribute, 0)
        if count:
            lines.append(f"  {count:,} {what}, among those looked at; see the messages")
    if names:
        listed = ", ".join(names[:10])
        lines.append(f"  {len(names)} classes: {listed}{' ...' * (len(names) > 10)}")
    return lines


def needed_keys(node: Any, path: str = "model") -> dict[str, str]:
    """List the batch entries that the conditioners below a config node read, with the places that ask for them."""
    found: dict[str, str] = {}
    if isinstance(node, list):
        for i, child in enumerate(node):
            found |= needed_keys(child, f"{path}[{i}]")
    if not isinstance(node, dict):
        return found
    if "target" in node:
        cls, params = find_target(node["target"], path), node.get("params") or {}
        if inspect.isclass(cls) and issubclass(cls, Conditioner):
            for name, parameter in inspect.signature(cls).parameters.items():
                key = params.get(name, parameter.default)
                if name in _KEYS and isinstance(key, str):
                    found[key] = path
    for name, child in node.items():
        found |= needed_keys(child, f"{path}.{name}")
    return found
