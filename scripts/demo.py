"""Train a text-to-image latent diffusion model in front of you: both stages, on two CPU cores, nothing downloaded.

    python scripts/demo.py

1. trains the autoencoder on generated scenes, 2. trains the diffusion model on its latents, 3. draws ten captions,
4. draws captions never seen in training, which a detector that knows nothing of the model checks, 5. writes
outputs/demo/report.html. Every command that it runs is printed, so that each can be run by itself.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import choose_device, progress
from ldm.toy.demo import run_demo
from ldm.toy.runs import Sampling


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--outdir", type=Path, default=Path("outputs/demo"), help="where runs and report go")
    add("--num-captions", type=int, default=200, help="unseen two-object captions to draw")
    add("--ddim_steps", type=int, default=50)
    add("--scale", type=float, default=3.0, help="classifier-free guidance")
    add("--batch-size", type=int, default=50, help="samples at a time")
    add("--device", default="auto")
    parser.epilog = "Any further dotted.key=value overrides the configs of both trainings."
    given = parse_with_overrides(parser, argv)
    sampling = Sampling(given.ddim_steps, given.scale, given.batch_size)
    run_demo(given.outdir, given.num_captions, sampling, choose_device(given.device), progress, given.overrides)


if __name__ == "__main__":
    main()
