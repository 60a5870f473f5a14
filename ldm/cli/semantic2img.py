"""Draw images of semantic maps (section 4.3.2).

    ldm semantic2img --run logs/RUN --indir MAPS --outdir outputs/semantic2img
    ldm semantic2img --run logs/RUN --indir MAP.png --H 512 --W 1024 --tile

A map is a grey or palette PNG, or a .npy of integers (H, W), whose values are class indices, as in training; pixels of
the training data's `ignore_index` belong to no class, and are shown black. --H and --W scale it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_images, readable
from ldm.cli.options import Defaults, OptionalSize, SamplingParser
from ldm.cli.sampling import ImageRequest, load_for_sampling, require_conditioner, sample_into_folder
from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.data.readers.single_images import cropped, padded, read_indices
from ldm.errors import UserError
from ldm.images import colour_classes
from ldm.models.enlargement import enlargement, input_size
from ldm.models.loading import LoadedModel, train_option

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
    sources: Sequence[Source],
    loaded: LoadedModel,
    conditioner: ImageConditioner | SpatialRescaler,
    size: OptionalSize,
) -> Iterator[ImageRequest]:
    """Yield one request for each map; sides that the model cannot have are filled up and cropped again."""
    scale, num_classes = enlargement(loaded.model, conditioner), conditioner.in_channels
    map_size, multiple = input_size(size, scale), (loaded.model.side_multiple / scale).numerator
    ignore_index = train_option(loaded.content, "ignore_index")

    def read(source: Source) -> Tensor:
        return _checked(read_indices(source.path, map_size), source.path, num_classes, ignore_index)

    for source, indices in readable(sources, read):
        size = tuple(int(side * scale) for side in indices.shape)
        whole = padded(indices, multiple)  # (h', w')
        yield ImageRequest(
            tuple(int(side * scale) for side in whole.shape),
            {conditioner.key: whole},
            {"map": str(source.path), "size": list(size)},
            source.name,
            source=F.interpolate(colour_classes(indices, num_classes)[None], size, mode="nearest")[0],
            finish=partial(cropped, size=size),
        )


def _checked(indices: Tensor, path: Path, num_classes: int, ignore_index: int | None) -> Tensor:
    """Return the map with -1, no class, where it has ignore_index. UserError for another index that is no class."""
    classes = indices[indices != ignore_index] if ignore_index is not None else indices.flatten()
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if len(wrong):
        also = "" if ignore_index is None else f", and {ignore_index} for none"
        raise UserError(f"{path}: has class {wrong[0]}; this model has classes 0 to {num_classes - 1}{also}")
    return indices if ignore_index is None else indices.masked_fill(indices == ignore_index, -1)
