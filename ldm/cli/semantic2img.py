"""Draw images of semantic maps (section 4.3.2).

    ldm semantic2img --run logs/RUN --indir MAPS --outdir outputs/semantic2img
    ldm semantic2img --run logs/RUN --indir MAP.png --H 512 --W 1024 --tile

A map is a grey or palette PNG, or a .npy of integers (H, W), whose values are class indices, as in training; pixels of
the training data's `ignore_index` belong to no class, and are shown black. --H and --W scale it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_images, readable
from ldm.cli.options import Defaults, OptionalSize, SamplingParser
from ldm.cli.sampling import load_for_sampling, require_conditioner, sample_into_folder
from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.data.readers.single_images import read_indices
from ldm.models.enlargement import enlargement, input_size
from ldm.models.image_request import ImageRequest
from ldm.models.loading import LoadedModel, train_option
from ldm.models.tasks import PlaneModel, map_request

_DEFAULTS = Defaults("outputs/semantic2img", steps=200)
_NEEDED = "semantic maps need an ImageConditioner or a SpatialRescaler of an index map"
_MAPS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".npy")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples images of every map."""
    parser = SamplingParser("semantic2img", __doc__, _DEFAULTS)
    parser.add_argument("--indir", "--map", required=True, metavar="PATH", help="a map, or a folder of them")
    given, options = parser.parse(argv)
    sources = list_images(given.indir, "--indir", _MAPS)
    loaded = load_for_sampling(options)
    conditioner = require_conditioner(loaded, (ImageConditioner, SpatialRescaler), _NEEDED)
    requests = _requests(sources, loaded, conditioner, options.size)
    sample_into_folder(loaded, requests, len(sources), options, given.n_samples)


def _requests(
    sources: Sequence[Source], loaded: LoadedModel, conditioner: PlaneModel, size: OptionalSize
) -> Iterator[ImageRequest]:
    """Yield one request for each map."""
    map_size = input_size(size, enlargement(loaded.model, conditioner))
    ignore_index = train_option(loaded.content, "ignore_index")

    def read(source: Source) -> ImageRequest:
        indices = read_indices(source.path, map_size)
        return map_request(indices, conditioner, loaded.model, ignore_index, str(source.path))

    for source, request in readable(sources, read):
        yield replace(request, details={"map": str(source.path), **request.details}, name=source.name)
