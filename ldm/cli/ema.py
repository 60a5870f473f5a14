"""Make averages of other lengths from the snapshots of a run (Karras et al., arXiv 2312.02696).

    ldm ema --run logs/RUN --sigma 0.03 0.05 0.1
    ldm ema --run logs/RUN --sigma 0.03..0.25 --out averages       eight lengths, evenly spaced on a log scale

The run has to be trained with training.params.averages={short: 0.05, long: 0.1} and the callback
lightning.callbacks.snapshots.target=ldm.training.snapshots.Snapshots. Each file can be given as --run to the other
commands.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.models.saving import export_averages

_LENGTHS_OF_A_RANGE = 8


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Write one file for each length."""
    parser = TaskParser("ema", __doc__)
    add = parser.add_argument
    add("--run", required=True, type=Path, metavar="RUN", help="run folder with snapshots")
    add("--sigma", required=True, nargs="+", type=_lengths, metavar="S", help="relative lengths, or a range A..B")
    add("--step", type=int, help="as of this step (default: the last snapshot)")
    add("--out", type=Path, metavar="FOLDER", help="where the files go (default: RUN/averages)")
    options = parser.parse_args(argv)
    lengths = [length for part in options.sigma for length in part]
    export_averages(options.run, lengths, options.out or options.run / "averages", options.step)


def _lengths(text: str) -> list[float]:
    first, is_range, last = text.partition("..")
    try:
        if not is_range:
            return [float(first)]
        return np.geomspace(float(first), float(last), _LENGTHS_OF_A_RANGE).tolist()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range such as 0.03..0.25") from None
