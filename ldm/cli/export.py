"""Write the weights of a run as one safetensors file, frozen parts included, with the config inside its metadata.

    ldm export --run logs/RUN --out model.safetensors [--ema] [--half]

The file is read by --ckpt of the other commands; its names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.models.saving import export_run


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = TaskParser("export", __doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder, or a checkpoint in one")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--ema", action="store_true", help="averaged weights under the raw names; default: both")
    parser.add_argument("--half", action="store_true", help="store floating-point numbers in 16 bits")
    options = parser.parse_args(argv)
    export_run(options.run, options.out, options.ema, options.half)
