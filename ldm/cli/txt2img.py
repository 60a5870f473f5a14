"""Draw images of a text.

    ldm txt2img --run logs/RUN --prompt "a red circle above a blue square" --n_samples 8

Without --run, --config and --ckpt the published model is taken, from models/ldm/text2img-large/model.ckpt.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldm.cli.entry import main_guard
from ldm.cli.inputs import read_prompts
from ldm.cli.options import Defaults, SamplingParser
from ldm.cli.published import Published
from ldm.cli.sampling import load_for_sampling, sample_into_folder
from ldm.errors import UserError
from ldm.models.image_request import ImageRequest

_DEFAULTS = Defaults("outputs/txt2img-samples", steps=200, guidance=5.0, n_samples=4)
PUBLISHED = Published(
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "ldm/txt2img.yaml",
    "models/ldm/text2img-large/model.ckpt",
    "https://ommer-lab.com/files/latent-diffusion/nitro/txt2img-f8-large/model.ckpt",
)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_iter * n_samples images of every prompt."""
    parser = SamplingParser("txt2img", __doc__, _DEFAULTS)
    add = parser.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar", help="what to draw")
    add("--from-file", metavar="FILE", help="one prompt per line, instead of --prompt")
    add("--n_iter", type=int, default=1, help="how often n_samples are drawn of each prompt")
    given, options = parser.parse(argv)
    options = PUBLISHED.apply_default(options)
    if min(given.n_iter, given.n_samples) < 1:
        raise UserError(f"--n_iter {given.n_iter}, --n_samples {given.n_samples}: use 1 or more of each")
    prompts = [given.prompt] if given.from_file is None else read_prompts(given.from_file)
    loaded = load_for_sampling(options)
    if not (keys := loaded.text_keys()):
        raise UserError(f"{loaded.config}: this model is not conditioned on text; use ldm sample")
    size, entries = loaded.size(options.size), [dict.fromkeys(keys, prompt) for prompt in prompts]
    more = {} if given.negative is None else {"negative": given.negative}
    requests = (ImageRequest(size, entry, entry | more) for entry in entries)
    sample_into_folder(loaded, requests, len(entries), options, given.n_iter * given.n_samples, given.n_samples)
