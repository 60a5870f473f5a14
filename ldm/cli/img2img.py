"""Draw images that start from given ones (SDEdit, arXiv 2108.01073), with a text for models that have one.

    ldm img2img --run logs/RUN --indir IMAGES --prompt "a blue circle" --strength 0.6 --scale 3

Images are noised to the share STRENGTH of the steps and denoised from there: a small one keeps the image, 1 hardly
anything of it. Sides that the model cannot have are filled up and cropped again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_images, readable
from ldm.cli.options import Defaults, SamplingParser
from ldm.cli.sampling import load_for_sampling, sample_into_folder
from ldm.data.readers.single_images import read_image
from ldm.errors import UserError
from ldm.models.generate import with_strength
from ldm.models.guidance import Guidance
from ldm.models.image_request import ImageRequest
from ldm.models.tasks import start_request

_DEFAULTS = Defaults("outputs/img2img", steps=50, guidance=5.0)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples images of every given one."""
    parser = SamplingParser("img2img", __doc__, _DEFAULTS)
    add = parser.add_argument
    add("--indir", required=True, metavar="PATH", help="an image, or a folder of them")
    add("--prompt", metavar="TEXT", help="what to draw")
    add("--strength", type=float, default=0.75, help="share of the steps that is taken, above 0 to 1 (default 0.75)")
    given, options = parser.parse(argv)
    sources, loaded = list_images(given.indir, "--indir"), load_for_sampling(options)
    options = replace(options, sampler=with_strength(options.sampler, given.strength, loaded.model.process))
    keys = loaded.text_keys()
    if not keys and options.guidance == Guidance(_DEFAULTS.guidance):  # which is for texts
        options = replace(options, guidance=Guidance())
    if len(keys) != len(list(loaded.model.conditioners())):
        raise UserError(f"{loaded.config}: this model is conditioned on more than text, which --prompt cannot give")
    texts = {name: text for name in ("prompt", "negative") if (text := getattr(given, name)) is not None}
    if keys and "prompt" not in texts:
        raise UserError(f"{loaded.config}: this model is conditioned on text; give --prompt TEXT")
    if texts and not keys:
        raise UserError(f"{loaded.config}: this model is not conditioned on text; leave out --{', --'.join(texts)}")

    def read(source: Source) -> Tensor:
        return read_image(source.path, loaded.model.in_channels, options.size, loaded.value_range)

    def request_of(source: Source, image: Tensor) -> ImageRequest:
        request = start_request(image, loaded.model.side_multiple, dict.fromkeys(keys, given.prompt))
        details = {"image": str(source.path), "strength": given.strength, **texts}
        return replace(request, details=details, name=source.name)

    requests = (request_of(*pair) for pair in readable(sources, read))
    sample_into_folder(loaded, requests, len(sources), options, given.n_samples)
