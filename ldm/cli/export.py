"""Write the weights of a run as one safetensors file, frozen parts included, with the config inside its metadata.

    ldm export --run logs/RUN --out model.safetensors [--ema] [--half]

The file is read by --ckpt of the other commands; its names are those of the published checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import yaml

from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser
from ldm.models.loading import ModelSource, read_config
from ldm.models.saving import save_state
from ldm.weights import load as checkpoint

_log = logging.getLogger(__name__)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = TaskParser("export", __doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder, or a checkpoint in one")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--ema", action="store_true", help="averaged weights under the raw names; default: both")
    parser.add_argument("--half", action="store_true", help="store floating-point numbers in 16 bits")
    options = parser.parse_args(argv)
    export(options.run, options.out, options.ema, options.half)


def export(run: str, out: Path, averaged: bool = False, half: bool = False) -> None:
    """Write the newest good checkpoint of a run to a file, whole or not at all. Raises UserError."""
    source = ModelSource(run)
    config, (_, found) = yaml.safe_dump(read_config(source), sort_keys=False, allow_unicode=True), source.files()
    state = checkpoint.read(found)
    if averaged:
        state = checkpoint.choose(state, "ema")
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_state(out, state, {"config": config, "checkpoint": found.name})
    _log.info("%s: %d tensors of %s", out, len(state), found)
