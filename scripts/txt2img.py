"""Draw pictures of a text.

    python scripts/txt2img.py --run logs/RUN --prompt "a red circle above a blue square" --n_samples 8

Without --run, --config and --ckpt the published model is taken, from models/ldm/text2img-large/model.ckpt.
"""

import argparse
from collections.abc import Sequence

from ldm.cli.common import (
    add_device_arguments,
    add_model_arguments,
    add_sampler_arguments,
    add_size_arguments,
    main_guard,
)
from ldm.cli.inputs import read_prompts
from ldm.cli.published import Published
from ldm.cli.sampling import conditioners, draw_into_folder, load_for_sampling
from ldm.conditioning.text import CLIPTextConditioner, TextConditioner
from ldm.errors import UserError

_PUBLISHED = Published(
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "ldm/txt2img.yaml",
    "models/ldm/text2img-large/model.ckpt",
    "https://ommer-lab.com/files/latent-diffusion/nitro/txt2img-f8-large/model.ckpt",
)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_iter * n_samples pictures of every prompt."""
    options = parse(argv)
    prompts = prompts_of(options)
    loaded, sampler = load_for_sampling(options)
    keys = [module.key for module in conditioners(loaded) if isinstance(module, (TextConditioner, CLIPTextConditioner))]
    if not keys:
        raise UserError(f"{loaded.config}: this model is not conditioned on text; use scripts/sample.py")
    texts = [prompt for prompt in prompts for _ in range(options.n_iter * options.n_samples)]
    draw_into_folder(loaded, sampler, options, {key: texts for key in keys}, len(texts))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw pictures of a text.")
    add = parser.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar", help="what to draw")
    add("--from-file", metavar="FILE", help="one prompt per line, instead of --prompt")
    add("--outdir", default="outputs/txt2img-samples", help="where pictures go")
    add("--n_iter", type=int, default=1, help="how often n_samples are drawn of each prompt")
    add("--n_samples", type=int, default=4, help="samples in a row of the grid, and at a time")
    add_model_arguments(parser)
    add_sampler_arguments(parser, steps=200, eta=0.0, scale=5.0)
    add_size_arguments(parser)
    add_device_arguments(parser)
    options = parser.parse_args(argv)
    options.columns = options.n_samples
    _PUBLISHED.stand_in(options)
    return options


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Take the prompt, or the lines of the file that are not empty."""
    if min(options.n_iter, options.n_samples) < 1:
        raise UserError(f"--n_iter {options.n_iter}, --n_samples {options.n_samples}: use 1 or more of each")
    return [options.prompt] if options.from_file is None else read_prompts(options.from_file)


if __name__ == "__main__":
    main()
