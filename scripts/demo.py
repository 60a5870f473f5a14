"""Train a text-to-image latent diffusion model in front of you: both stages, on two CPU cores, nothing downloaded.

Both stages are trained on generated scenes; then captions never seen in training are sampled and checked by a detector
that knows nothing of the model. Every command is printed, so that each can be run by itself; the report is in OUTDIR.
Any further dotted.key=value overrides the configs of both trainings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import choose_device, progress
from ldm.sampling import sampler_names
from ldm.toy.demo import run_demo
from ldm.toy.runs import Sampling


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--outdir", type=Path, default=Path("outputs/demo"), help="where runs and report go")
    add("--config", default="txt2img_shapes", help="second stage: txt2img_shapes, txt2img_shapes_flow or _edm")
    add("--num-captions", type=int, default=200, help="unseen two-object captions to draw")
    add("--steps", "--ddim_steps", type=int, default=50)
    add("--sampler", choices=sampler_names(), default="ddim")
    add("--scale", type=float, default=3.0, help="classifier-free guidance")
    add("--batch-size", type=int, default=50, help="samples at a time")
    add("--device", default="auto")
    given = parse_with_overrides(parser, argv)
    sampling = Sampling(given.steps, given.scale, given.batch_size, given.sampler)
    device = choose_device(given.device)
    run_demo(given.outdir, given.num_captions, sampling, device, progress, given.overrides, given.config)


if __name__ == "__main__":
    main()
