"""Draw pictures of semantic maps (section 4.3.2).

    python scripts/semantic2img.py --run logs/RUN --indir MAPS --outdir outputs/semantic2img
    python scripts/semantic2img.py --run logs/RUN --indir MAP.png --H 512 --W 1024 --tile

A map is a grey or palette PNG, or a .npy of integers (H, W), whose values are class indices, as in training; pixels of
the training data's `ignore_index` belong to no class, and are shown black. --H and --W scale it first.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ldm.cli.common import add_task_arguments, main_guard
from ldm.cli.inputs import Source, cropped, list_images, padded, read_indices, readable
from ldm.cli.rescaling import enlargement, input_size
from ldm.cli.sampling import Drawing, draw_all, load_for_sampling, only_conditioner
from ldm.conditioning.images import ImageConditioner, SpatialRescaler
from ldm.errors import UserError
from ldm.images import colour_classes
from ldm.models.loading import LoadedModel, train_option

_NEEDED = "semantic maps need an ImageConditioner or a SpatialRescaler of an index map"
_MAPS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".npy")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples pictures of every map."""
    options = parse(argv)
    sources = list_images(options.indir, "--indir", _MAPS)
    loaded, sampler = load_for_sampling(options)
    conditioner = only_conditioner(loaded, (ImageConditioner, SpatialRescaler), _NEEDED)
    drawings = describe(sources, loaded, conditioner, options)
    draw_all(loaded, sampler, options, drawings, len(sources) * options.n_samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indir", "--map", required=True, metavar="PATH", help="a map, or a folder of them")
    add_task_arguments(parser, "outputs/semantic2img", steps=200)
    return parser.parse_args(argv)


def describe(
    sources: Sequence[Source],
    loaded: LoadedModel,
    conditioner: ImageConditioner | SpatialRescaler,
    options: argparse.Namespace,
) -> Iterator[Drawing]:
    """Describe the drawings; sides that the model cannot have are filled up and cut again."""
    scale, num_classes = enlargement(loaded, conditioner), conditioner.in_channels
    target, multiple = input_size((options.H, options.W), scale), (loaded.model.side_multiple / scale).numerator
    ignore_index = train_option(loaded.content, "ignore_index")

    def read(source: Source) -> Tensor:
        return checked(read_indices(source.path, target), source.path, num_classes, ignore_index)

    for source, indices in readable(sources, read):
        size = tuple(int(side * scale) for side in indices.shape)
        whole = padded(indices, multiple)  # (h', w')
        shown = colour_classes(indices, num_classes)
        for _ in range(options.n_samples):
            yield Drawing(
                tuple(int(side * scale) for side in whole.shape),
                {conditioner.key: whole},
                {"map": str(source.path), "size": list(size)},
                source.name,
                beside=F.interpolate(shown[None], size, mode="nearest")[0],
                finish=lambda sample, size=size: cropped(sample, size),
            )


def checked(indices: Tensor, path: Path, num_classes: int, ignore_index: int | None) -> Tensor:
    """Return the map with -1, no class, where it has ignore_index. UserError for another index that is no class."""
    classes = indices[indices != ignore_index] if ignore_index is not None else indices.flatten()
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if len(wrong):
        also = "" if ignore_index is None else f", and {ignore_index} for none"
        raise UserError(f"{path}: has class {wrong[0]}; this model has classes 0 to {num_classes - 1}{also}")
    return indices if ignore_index is None else indices.masked_fill(indices == ignore_index, -1)


if __name__ == "__main__":
    main()
