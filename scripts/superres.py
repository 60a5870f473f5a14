"""Enlarge pictures by the factor that a super-resolution model was trained for (section 4.4).

    python scripts/superres.py --run logs/RUN --indir SMALL --outdir outputs/superres --steps 100
    python scripts/superres.py --config bsr_sr/config.yaml --ckpt bsr_sr/model.ckpt --indir A.png --tile 512

Any size will do; --tile bounds the memory. --H and --W scale the picture first, so that the output has these sides.
--consistent corrects coarse colours and brightness to those of the given picture, where it shows what was shrunk.
A model of pairs of equal size (configs/own/pairs.yaml) draws the picture that belongs to the given one.
"""

import argparse
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial

from torch import Tensor

from ldm.cli.common import add_task_arguments, main_guard
from ldm.cli.inputs import Source, cropped, list_images, padded, read_image, readable
from ldm.cli.rescaling import enlargement, input_size
from ldm.cli.sampling import Drawing, draw_all, load_for_sampling, only_conditioner
from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.errors import UserError
from ldm.models.back_projection import back_project
from ldm.models.loading import LoadedModel, train_option

_NEEDED = "super-resolution needs an ImageConditioner or a SpatialRescaler of a small picture"


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples enlargements of every picture."""
    options = parse(argv)
    sources = list_images(options.indir, "--indir")
    loaded, sampler = load_for_sampling(options)
    conditioner = only_conditioner(loaded, (ImageConditioner, SpatialRescaler), _NEEDED)
    scale, channels = enlargement(loaded, conditioner), conditioner.in_channels
    if scale.denominator > 1 or sees_maps(loaded, conditioner):
        seen = f"{channels} {'classes' if sees_maps(loaded, conditioner) else 'channels'} at 1/{scale}"
        raise UserError(f"{loaded.config}: this model sees {seen} of the output's sides, not small pictures; {_NEEDED}")
    if options.consistent and channels != loaded.model.in_channels:
        raise UserError(f"--consistent: {loaded.config} sees {channels} channels and draws {loaded.model.in_channels}")
    drawings = describe(sources, loaded, conditioner, int(scale), options)
    draw_all(loaded, sampler, options, drawings, len(sources) * options.n_samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indir", "--image", required=True, metavar="PATH", help="a small picture, or a folder")
    parser.add_argument("--consistent", action="store_true", help="hold samples to the given picture (back projection)")
    add_task_arguments(parser, "outputs/superres", steps=100, eta=1.0)
    return parser.parse_args(argv)


def sees_maps(loaded: LoadedModel, conditioner: ImageConditioner | SpatialRescaler) -> bool:
    """Return whether a model draws from maps of class indices, under `segmentation` unless the data say so."""
    return conditioner.key == "segmentation" or train_option(loaded.content, "num_classes") is not None


def describe(
    sources: Sequence[Source],
    loaded: LoadedModel,
    conditioner: ImageConditioner | SpatialRescaler,
    factor: int,
    options: argparse.Namespace,
) -> Iterator[Drawing]:
    """Describe the drawings; sides that the model cannot have are filled up and cut again."""
    target = input_size((options.H, options.W), Fraction(factor))
    channels, multiple = conditioner.in_channels, Fraction(loaded.model.side_multiple, factor).numerator
    value_range = loaded.value_range

    def read(source: Source) -> Tensor:
        return read_image(source.path, channels, target, value_range)

    for source, image in readable(sources, read):
        size = (image.shape[1] * factor, image.shape[2] * factor)
        low_res = padded(from_bytes(image), multiple)  # (C, h', w')
        shown = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        for _ in range(options.n_samples):
            yield Drawing(
                (low_res.shape[1] * factor, low_res.shape[2] * factor),
                {conditioner.key: low_res},
                {"image": str(source.path), "size": list(size)},
                source.name,
                beside=shown,
                finish=partial(finished, size=size, low_res=low_res if options.consistent else None),
            )


def finished(sample: Tensor, size: tuple[int, int], low_res: Tensor | None) -> Tensor:
    """Cut the bytes of a sample (C, H, W) to its size, held to the small picture where one is given."""
    if low_res is not None:
        sample = to_bytes(back_project(from_bytes(sample)[None], low_res[None])[0])
    return cropped(sample, size)


if __name__ == "__main__":
    main()
