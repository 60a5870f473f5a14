"""Fill holes in pictures. What is not in the hole is kept to the last of its 8 bits.

    python scripts/inpaint.py --run logs/RUN --indir PICTURES --outdir outputs/inpaint --steps 50
    python scripts/inpaint.py --config inpainting_big/config.yaml --ckpt inpainting_big/last.ckpt --indir PICTURES
    python scripts/inpaint.py --run logs/RUN --image A.png --mask M.png

PICTURES holds pairs NAME.png and NAME_mask.png, of one size; a mask is white (128 and more) in the hole, or 1 if it
holds 0 and 1 alone, or any index but 0 of a palette. Models trained for it see the picture with a black hole and the
mask (section 4.5); a model without condition is held at the noised known parts at every step instead.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli.common import add_task_arguments, main_guard
from ldm.cli.inputs import Source, cropped, describe_loss, list_masked, padded, read_image, read_mask, readable
from ldm.cli.published import Published
from ldm.cli.sampling import Drawing, conditioners, draw_all, load_for_sampling, only_conditioner
from ldm.conditioning.images import FirstStageConditioner
from ldm.data.core.pixels import from_bytes
from ldm.errors import UserError
from ldm.models.loading import LoadedModel

_log = logging.getLogger("ldm.inpaint")
_PUBLISHED = Published(
    "models/ldm/inpainting_big/config.yaml",
    "ldm/inpainting_big.yaml",
    "models/ldm/inpainting_big/last.ckpt",
    "https://heibox.uni-heidelberg.de/f/4d9ac7ea40c64582b7c9/?dl=1",
)
_NEEDED = "inpainting needs a FirstStageConditioner with a mask_key, or a model without condition"


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples fillings of every picture."""
    options = parse(argv)
    sources = list_masked(options.indir) if options.indir else [single(options)]
    loaded, sampler = load_for_sampling(options)
    conditioner = None
    if conditioners(loaded):
        conditioner = only_conditioner(loaded, FirstStageConditioner, _NEEDED)
        if conditioner.mask_key is None:
            raise UserError(f"{loaded.config}: this model sees no mask; {_NEEDED}")
    drawings = describe(sources, loaded, conditioner, options)
    draw_all(loaded, sampler, options, drawings, len(sources) * options.n_samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--indir", metavar="DIR", help="pairs NAME.png, NAME_mask.png")
    add("--image", metavar="FILE", help="one picture, instead of --indir")
    add("--mask", metavar="FILE", help="the mask of --image")
    add_task_arguments(parser, "outputs/inpaint", steps=50)
    options = parser.parse_args(argv)
    if (options.indir is None) == (options.image is None) or (options.image is None) != (options.mask is None):
        raise UserError("nothing to fill: give --indir DIR, or --image FILE with --mask FILE")
    _PUBLISHED.stand_in(options)
    return options


def single(options: argparse.Namespace) -> Source:
    """Take the one picture of the command line. UserError if it or its mask is not there."""
    for flag, place in (("--image", options.image), ("--mask", options.mask)):
        if not Path(place).is_file():
            raise UserError(f"{flag} {place}: no such file")
    return Source(Path(options.image), Path(options.image).stem, Path(options.mask))


def describe(
    sources: Sequence[Source],
    loaded: LoadedModel,
    conditioner: FirstStageConditioner | None,
    options: argparse.Namespace,
) -> Iterator[Drawing]:
    """Describe the drawings; sides that the model cannot have are filled up with known pixels and cut again."""
    target, channels, value_range = (options.H, options.W), loaded.model.in_channels, loaded.value_range

    def read(source: Source) -> tuple[Tensor, Tensor, str | None]:
        image = read_image(source.path, channels, value_range=value_range)
        hole = read_mask(source.mask, tuple(image.shape[1:]), target)
        if target != (None, None):
            image = read_image(source.path, channels, target, value_range)
        return image, hole, None if warned else describe_loss(source.path, channels, value_range)

    warned = False
    for source, (image, hole, lost) in readable(sources, read):
        if lost is not None:
            _log.warning("%s: %s, also where it is known; further such pictures are not named", source.path, lost)
            warned = True
        for _ in range(options.n_samples):
            yield drawing(source, image, hole, conditioner, loaded.model.side_multiple)


def drawing(
    source: Source, image: Tensor, hole: Tensor, conditioner: FirstStageConditioner | None, multiple: int
) -> Drawing:
    """Describe one drawing of a picture of bytes (C, H, W) with a hole, bool (1, H, W)."""
    size = tuple(image.shape[1:])
    picture = padded(from_bytes(image), multiple)  # (C, H', W')
    mask = torch.full((1, *picture.shape[1:]), -1.0)
    mask[:, : size[0], : size[1]][hole] = 1.0

    def finish(sample: Tensor) -> Tensor:
        return torch.where(hole, cropped(sample, size), image)

    conditions, known = {}, (picture, mask)
    if conditioner is not None:
        masked = torch.where(mask > 0, torch.tensor(-1.0), picture)
        conditions, known = {conditioner.key: masked, conditioner.mask_key: mask}, None
    return Drawing(
        tuple(picture.shape[1:]),
        conditions,
        {"image": str(source.path), "mask": str(source.mask), "size": list(size)},
        source.name,
        beside=torch.where(hole, torch.zeros_like(image), image),
        known=known,
        finish=finish,
    )


if __name__ == "__main__":
    main()
