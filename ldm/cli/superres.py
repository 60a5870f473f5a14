"""Enlarge images by the factor that a super-resolution model was trained for (section 4.4).

    ldm superres --run logs/RUN --indir SMALL --outdir outputs/superres --steps 100
    ldm superres --config bsr_sr/config.yaml --ckpt bsr_sr/model.ckpt --indir A.png --tile 512

Any size will do; --tile bounds the memory. --H and --W scale the image first, so that the output has these sides.
--consistent corrects coarse colours and brightness to those of the given image, where it shows what was shrunk.
A model of pairs of equal size (configs/own/pairs.yaml) draws the image that belongs to the given one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_images, readable
from ldm.cli.options import Defaults, OptionalSize, SamplingParser
from ldm.cli.sampling import load_for_sampling, require_conditioner, sample_into_folder
from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.data.readers.single_images import read_image
from ldm.errors import UserError
from ldm.models.enlargement import enlargement, input_size
from ldm.models.image_request import ImageRequest
from ldm.models.loading import LoadedModel
from ldm.models.tasks import PlaneModel, enlargement_factor, enlargement_request, reads_maps

_DEFAULTS = Defaults("outputs/superres", steps=100, eta=1.0)
_NEEDED = "super-resolution needs an ImageConditioner or a SpatialRescaler of a small image"


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples enlargements of every image."""
    parser = SamplingParser("superres", __doc__, _DEFAULTS)
    parser.add_argument("--indir", "--image", required=True, metavar="PATH", help="a small image, or a folder")
    parser.add_argument("--consistent", action="store_true", help="back-project samples to the given image")
    given, options = parser.parse(argv)
    sources = list_images(given.indir, "--indir")
    loaded = load_for_sampling(options)
    conditioner = require_conditioner(loaded, (ImageConditioner, SpatialRescaler), _NEEDED)
    if given.consistent and conditioner.in_channels != loaded.model.in_channels:
        channels = f"receives {conditioner.in_channels} channels and draws {loaded.model.in_channels}"
        raise UserError(f"--consistent: {loaded.config} {channels}")
    requests = _requests(sources, loaded, conditioner, options.size, given.consistent)
    sample_into_folder(loaded, requests, len(sources), options, given.n_samples)


def _factor(loaded: LoadedModel, conditioner: PlaneModel) -> int:
    """Return the enlargement. UserError for a model of larger images, or of maps of class indices."""
    factor = enlargement_factor(loaded, conditioner)
    if factor is None:
        kind = "classes" if reads_maps(loaded, conditioner) else "channels"
        inputs = f"{conditioner.in_channels} {kind} at 1/{enlargement(loaded.model, conditioner)}"
        raise UserError(f"{loaded.config}: this model sees {inputs} of the output's sides, not small images; {_NEEDED}")
    return factor


def _requests(
    sources: Sequence[Source], loaded: LoadedModel, conditioner: PlaneModel, size: OptionalSize, is_consistent: bool
) -> Iterator[ImageRequest]:
    """Yield one request for each image."""
    factor = _factor(loaded, conditioner)
    given_size = input_size(size, Fraction(factor))

    def read(source: Source) -> Tensor:
        return read_image(source.path, conditioner.in_channels, given_size, loaded.value_range)

    for source, image in readable(sources, read):
        request = enlargement_request(image, conditioner, factor, loaded.model, is_consistent)
        yield replace(request, details={"image": str(source.path), **request.details}, name=source.name)
