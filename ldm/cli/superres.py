"""Enlarge images by the factor that a super-resolution model was trained for (section 4.4).

    ldm superres --run logs/RUN --indir SMALL --outdir outputs/superres --steps 100
    ldm superres --config bsr_sr/config.yaml --ckpt bsr_sr/model.ckpt --indir A.png --tile 512

Any size will do; --tile bounds the memory. --H and --W scale the image first, so that the output has these sides.
--consistent corrects coarse colours and brightness to those of the given image, where it shows what was shrunk.
A model of pairs of equal size (configs/own/pairs.yaml) draws the image that belongs to the given one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial

from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.inputs import Source, list_images, readable
from ldm.cli.options import Defaults, OptionalSize, SamplingParser
from ldm.cli.sampling import ImageRequest, load_for_sampling, require_conditioner, sample_into_folder
from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.data.readers.single_images import cropped, padded, read_image
from ldm.errors import UserError
from ldm.models.back_projection import back_project
from ldm.models.enlargement import enlargement, input_size
from ldm.models.loading import LoadedModel, train_option

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


def _factor(loaded: LoadedModel, conditioner: ImageConditioner | SpatialRescaler) -> int:
    """Return the enlargement. UserError for a model of larger images, or of maps of class indices."""
    scale, channels = enlargement(loaded.model, conditioner), conditioner.in_channels
    # maps are under `segmentation` unless the data say so
    has_maps = conditioner.key == "segmentation" or train_option(loaded.content, "num_classes") is not None
    if scale.denominator > 1 or has_maps:
        inputs = f"{channels} {'classes' if has_maps else 'channels'} at 1/{scale}"
        raise UserError(f"{loaded.config}: this model sees {inputs} of the output's sides, not small images; {_NEEDED}")
    return int(scale)


def _requests(
    sources: Sequence[Source],
    loaded: LoadedModel,
    conditioner: ImageConditioner | SpatialRescaler,
    size: OptionalSize,
    is_consistent: bool,
) -> Iterator[ImageRequest]:
    """Yield one request for each image; sides that the model cannot have are filled up and cropped again."""
    factor = _factor(loaded, conditioner)
    given_size, multiple = input_size(size, Fraction(factor)), Fraction(loaded.model.side_multiple, factor).numerator

    def read(source: Source) -> Tensor:
        return read_image(source.path, conditioner.in_channels, given_size, loaded.value_range)

    for source, image in readable(sources, read):
        size = (image.shape[1] * factor, image.shape[2] * factor)
        low_res = padded(from_bytes(image), multiple)  # (C, h', w')
        yield ImageRequest(
            (low_res.shape[1] * factor, low_res.shape[2] * factor),
            {conditioner.key: low_res},
            {"image": str(source.path), "size": list(size)},
            source.name,
            source=image.repeat_interleave(factor, 1).repeat_interleave(factor, 2),
            finish=partial(_finished, size=size, low_res=low_res if is_consistent else None),
        )


def _finished(sample: Tensor, size: tuple[int, int], low_res: Tensor | None) -> Tensor:
    """Crop the bytes of a sample (C, H, W) to its size, corrected to the small image where one is given."""
    if low_res is not None:
        sample = to_bytes(back_project(from_bytes(sample)[None], low_res[None])[0])
    return cropped(sample, size)
