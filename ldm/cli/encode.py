"""Encode the training set of a config into files, from which its trainings read instead of encoding images.

    ldm encode --base configs/ldm/txt2img.yaml                 then main.py -t with lightning.cache_latents=true
    torchrun --nproc_per_node 8 -- scripts/encode.py --base configs/ldm/txt2img.yaml

Flags and overrides are those of main.py; the encoding goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm.cli.arguments import parse
from ldm.cli.entry import main_guard
from ldm.cli.train import plan_of
from ldm.training.run import encode_plan


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Write the files."""
    encode_plan(plan_of(parse(argv or [])))
