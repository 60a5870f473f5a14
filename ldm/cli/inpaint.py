"""Fill holes in images. What is not in the hole is kept to the last of its 8 bits.

    ldm inpaint --run logs/RUN --indir IMAGES --outdir outputs/inpaint --steps 50
    ldm inpaint --config inpainting_big/config.yaml --ckpt inpainting_big/last.ckpt --indir IMAGES
    ldm inpaint --run logs/RUN --image A.png --mask M.png

IMAGES holds pairs NAME.png and NAME_mask.png, of one size; a mask is white (128 and more) in the hole, or 1 if it
holds 0 and 1 alone, or transparent where all is one colour, or any index but 0 of a palette in which that is black.
Models trained for it receive the image with a black hole and the mask (section 4.5); for a model without condition the
known parts, noised, replace the samples' at every step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_masked, readable
from ldm.cli.options import Defaults, OptionalSize, SamplingParser
from ldm.cli.published import Published
from ldm.cli.sampling import ImageRequest, load_for_sampling, require_conditioner, sample_into_folder
from ldm.conditioning.images import FirstStageConditioner
from ldm.data.core.pixels import from_bytes
from ldm.data.readers.single_images import cropped, describe_loss, padded, read_image, read_mask
from ldm.errors import UserError
from ldm.models.loading import LoadedModel

_log = logging.getLogger(__name__)
_DEFAULTS = Defaults("outputs/inpaint", steps=50)
_PUBLISHED = Published(
    "models/ldm/inpainting_big/config.yaml",
    "ldm/inpainting_big.yaml",
    "models/ldm/inpainting_big/last.ckpt",
    "https://heibox.uni-heidelberg.de/f/4d9ac7ea40c64582b7c9/?dl=1",
)
_NEEDED = "inpainting needs a FirstStageConditioner with a mask_key, or a model without condition"


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Fill every image n_samples times."""
    parser = SamplingParser("inpaint", __doc__, _DEFAULTS)
    add = parser.add_argument
    add("--indir", metavar="DIR", help="pairs NAME.png, NAME_mask.png")
    add("--image", metavar="FILE", help="one image, instead of --indir")
    add("--mask", metavar="FILE", help="the mask of --image")
    given, options = parser.parse(argv)
    if (given.indir is None) == (given.image is None) or (given.image is None) != (given.mask is None):
        raise UserError("nothing to fill: give --indir DIR, or --image FILE with --mask FILE")
    options = _PUBLISHED.apply_default(options)
    sources = list_masked(given.indir) if given.indir else [_single(given.image, given.mask)]
    loaded = load_for_sampling(options)
    conditioner = None
    if any(loaded.model.conditioners()):
        conditioner = require_conditioner(loaded, FirstStageConditioner, _NEEDED)
        if conditioner.mask_key is None:
            raise UserError(f"{loaded.config}: this model receives no mask; {_NEEDED}")
    requests = (
        request_of(source, image, hole, conditioner, loaded.model.side_multiple)
        for source, image, hole in _masked_images(sources, loaded, options.size)
    )
    sample_into_folder(loaded, requests, len(sources), options, given.n_samples)


def _single(image: str, mask: str) -> Source:
    """Return the one image of the command line. UserError if it or its mask is not there."""
    for flag, file in (("--image", image), ("--mask", mask)):
        if not Path(file).is_file():
            raise UserError(f"{flag} {file}: no such file")
    return Source(Path(image), Path(image).stem, Path(mask))


def _masked_images(
    sources: Sequence[Source], loaded: LoadedModel, size: OptionalSize
) -> Iterator[tuple[Source, Tensor, Tensor]]:
    """Yield each image as bytes (C, H, W) and its hole, bool (1, H, W); the first one that loses bits is logged."""
    channels, value_range = loaded.model.in_channels, loaded.value_range
    has_warned = False

    def read(source: Source) -> tuple[Tensor, Tensor, str | None]:
        image = read_image(source.path, channels, value_range=value_range)
        hole = read_mask(source.mask, tuple(image.shape[1:]), size)
        if size != (None, None):
            image = read_image(source.path, channels, size, value_range)
        return image, hole, None if has_warned else describe_loss(source.path, channels, value_range)

    for source, (image, hole, lost) in readable(sources, read):
        if lost is not None:
            _log.warning("%s: %s, also where it is known; further such images are not named", source.path, lost)
            has_warned = True
        yield source, image, hole


def request_of(
    source: Source, image: Tensor, hole: Tensor, conditioner: FirstStageConditioner | None, multiple: int
) -> ImageRequest:
    """Return the request for an image of bytes (C, H, W) with a hole, bool (1, H, W).

    Sides that `multiple` does not divide are filled up with known pixels and cropped again.
    """
    size = tuple(image.shape[1:])
    x = padded(from_bytes(image), multiple)  # (C, H', W')
    mask = torch.full((1, *x.shape[1:]), -1.0)
    mask[:, : size[0], : size[1]][hole] = 1.0
    conditions, target = {}, (x, mask)
    if conditioner is not None:
        masked = torch.where(mask > 0, torch.tensor(-1.0), x)
        conditions, target = {conditioner.key: masked, conditioner.mask_key: mask}, None
    return ImageRequest(
        tuple(x.shape[1:]),
        conditions,
        {"image": str(source.path), "mask": str(source.mask), "size": list(size)},
        source.name,
        source=torch.where(hole, torch.zeros_like(image), image),
        target=target,
        finish=lambda sample: torch.where(hole, cropped(sample, size), image),
    )
