"""Fill holes in images. What is not in the hole is kept to the last of its 8 bits.

    ldm inpaint --run logs/RUN --indir IMAGES --outdir outputs/inpaint --steps 50
    ldm inpaint --config inpainting_big/config.yaml --ckpt inpainting_big/last.ckpt --indir IMAGES
    ldm inpaint --run logs/RUN --image A.png --mask M.png
    ldm inpaint --run logs/RUN --indir IMAGES --outpaint 64,0,64,0

IMAGES holds pairs NAME.png and NAME_mask.png, of one size; a mask is white (128 and more) in the hole, or 1 if it
holds 0 and 1 alone, or transparent where all is one colour, or any index but 0 of a palette in which that is black.
Models trained for it receive the image with a black hole and the mask (section 4.5), and those of texts a --prompt; in
a model without a mask the known parts, noised, replace the samples' at every step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_images, list_masked, readable
from ldm.cli.options import Defaults, OptionalSize, SamplingParser
from ldm.cli.published import Published
from ldm.cli.sampling import load_for_sampling, sample_into_folder
from ldm.data.readers import single_images
from ldm.errors import UserError
from ldm.models.image_request import ImageRequest
from ldm.models.loading import LoadedModel
from ldm.models.masking import Masking, mask_conditioner
from ldm.models.tasks import hole_request

_log = logging.getLogger(__name__)
_DEFAULTS = Defaults("outputs/inpaint", steps=50)
_PUBLISHED = Published(
    "models/ldm/inpainting_big/config.yaml",
    "ldm/inpainting_big.yaml",
    "models/ldm/inpainting_big/last.ckpt",
    "https://heibox.uni-heidelberg.de/f/4d9ac7ea40c64582b7c9/?dl=1",
)
Texts = Mapping[str, str]


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Fill every image n_samples times."""
    parser = SamplingParser("inpaint", __doc__, _DEFAULTS)
    add = parser.add_argument
    add("--indir", metavar="DIR", help="pairs NAME.png, NAME_mask.png")
    add("--image", metavar="FILE", help="one image, instead of --indir")
    add("--mask", metavar="FILE", help="the mask of --image")
    add("--outpaint", type=single_images.margins_of, metavar="L,T,R,B", help="pixels to draw around the images")
    add("--prompt", metavar="TEXT", help="what to draw, for a model of texts")
    given, options = parser.parse(argv)
    needs_mask = given.image is not None and given.outpaint is None
    if (given.indir is None) == (given.image is None) or needs_mask != (given.mask is not None):
        raise UserError("nothing to fill: give --indir DIR, or --image FILE with --mask FILE; or --outpaint")
    options = _PUBLISHED.apply_default(options)
    if given.outpaint is not None:
        sources = list_images(given.indir or given.image, "--indir" if given.indir else "--image")
    else:
        sources = list_masked(given.indir) if given.indir else [_single(given.image, given.mask)]
    loaded = load_for_sampling(options)
    conditioner, keys = mask_conditioner(loaded), loaded.text_keys()
    if (given.prompt is None) == bool(keys):
        problem = "say what to draw; this is" if keys else "has no effect; this is not"
        raise UserError(f"--prompt: {problem} a model of texts: {loaded.config}")
    texts = dict.fromkeys(keys, given.prompt)
    requests = (
        request_of(*masked, conditioner, loaded.model.side_multiple, texts)
        for masked in _masked_images(sources, loaded, options.size, given.outpaint)
    )
    sample_into_folder(loaded, requests, len(sources), options, given.n_samples)


def _single(image: str, mask: str) -> Source:
    """Return the one image of the command line. UserError if it or its mask is not there."""
    for flag, file in (("--image", image), ("--mask", mask)):
        if not Path(file).is_file():
            raise UserError(f"{flag} {file}: no such file")
    return Source(Path(image), Path(image).stem, Path(mask))


def _masked_images(
    sources: Sequence[Source], loaded: LoadedModel, size: OptionalSize, margins: single_images.Margins | None
) -> Iterator[tuple[Source, Tensor, Tensor]]:
    """Yield each image as bytes (C, H, W) and its hole, bool (1, H, W); the first one that loses bits is logged."""
    channels, value_range = loaded.model.in_channels, loaded.value_range
    has_warned = False

    def read(source: Source) -> tuple[Tensor, Tensor, str | None]:
        image = single_images.read_image(source.path, channels, value_range=value_range)
        hole = None if margins else single_images.read_mask(source.mask, tuple(image.shape[1:]), size)
        if size != (None, None):
            image = single_images.read_image(source.path, channels, size, value_range)
        image, hole = single_images.extended(image, margins) if margins else (image, hole)
        return image, hole, None if has_warned else single_images.describe_loss(source.path, channels, value_range)

    for source, (image, hole, lost) in readable(sources, read):
        if lost is not None:
            _log.warning("%s: %s, also where it is known; further such images are not named", source.path, lost)
            has_warned = True
        yield source, image, hole


def request_of(
    source: Source, image: Tensor, hole: Tensor, conditioner: Masking | None, multiple: int, texts: Texts | None = None
) -> ImageRequest:
    """Return the request for an image of bytes (C, H, W) with a hole, bool (1, H, W)."""
    request = hole_request(image, hole, conditioner, multiple, texts)
    details = {"image": str(source.path), "mask": str(source.mask or "around it"), **request.details}
    return replace(request, details=details, name=source.name)
