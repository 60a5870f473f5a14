"""Write the weights of a run as one safetensors file, frozen parts included, with the config inside its metadata.

    ldm export --run logs/RUN --out model.safetensors [--ema] [--half]
    ldm export --run logs/RUN --out FOLDER --format diffusers [--half]
    ldm export --run logs/RUN --out adapter.safetensors --format adapter

The file is read by --ckpt of the other commands, the folder by --run; a file has the published names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.models.saving import ADAPTER, FORMATS, export_run


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = TaskParser("export", __doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder, or a checkpoint in one")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file, or new folder, to write")
    parser.add_argument("--format", choices=(*FORMATS, ADAPTER), default=FORMATS[0], help=f"default {FORMATS[0]}")
    parser.add_argument("--ema", action="store_true", help="averaged weights alone (diffusers: always)")
    parser.add_argument("--half", action="store_true", help="store floating-point numbers in 16 bits")
    merge = "merge the run's own adapter, and these, into the averaged weights"
    parser.add_argument("--merge", nargs="*", metavar="FILE[:0.8]", help=merge)
    options = parser.parse_args(argv)
    export_run(options.run, options.out, options.ema, options.half, options.format, options.merge)
