"""Draw pictures of layouts: objects and their boxes (section 4.3.2).

    python scripts/layout2img.py --run logs/RUN --layout layout.json --n_samples 4
    python scripts/layout2img.py --config layout2img-openimages256/config.yaml --ckpt model.ckpt --layout layout.json

layout.json: [{"label": 3, "box": [left, top, width, height]}, ...] in fractions of the picture, or a list of such
layouts; with --names a file of class names, {"name": "dog", "box": [...]} will do. The grid shows the boxes beside the
pictures. With --tile every tile of the denoiser gets its own part of the layout.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli.box_files import LabelledBox, box_tensors, crop_layout, read_layouts, read_names
from ldm.cli.common import add_task_arguments, main_guard
from ldm.cli.sampling import Drawing, draw_all, load_for_sampling, only_conditioner, picture_size
from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.text import TokenConditioner
from ldm.data.layout.boxes import FULL_IMAGE, Box, BoxTokenizer, LayoutObject, LayoutTokenizer
from ldm.images import draw_boxes
from ldm.models.loading import LoadedModel
from ldm.models.tiled import TiledConditioner, tile_boxes

_NEEDED = "layouts need a LayoutConditioner, or a TokenConditioner of box tokens"


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples pictures of every layout."""
    options = parse(argv)
    names = read_names(options.names)
    loaded, sampler = load_for_sampling(options, contexts_differ=True)
    conditioner = only_conditioner(loaded, (LayoutConditioner, TokenConditioner), _NEEDED)
    tokenizer = tokenizer_of(conditioner)
    read = [
        (path, layout)
        for path in options.layout
        for layout in read_layouts(Path(path), names, tokenizer.num_classes, tokenizer.max_objects)
    ]
    drawings = describe(read, names, loaded, conditioner, options)
    draw_all(loaded, sampler, options, drawings, len(read) * options.n_samples)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", required=True, nargs="+", metavar="JSON", help="files of layouts")
    parser.add_argument("--names", metavar="FILE", help="class names in the order of their labels, a line each or JSON")
    add_task_arguments(parser, "outputs/layout2img", steps=200)
    return parser.parse_args(argv)


def tokenizer_of(conditioner: LayoutConditioner | TokenConditioner) -> LayoutTokenizer:
    """Return the tokenizer of a model; the published one has boxes as tokens, whose classes are tokens themselves."""
    if isinstance(conditioner, LayoutConditioner):
        return conditioner.tokenizer
    vocab_size, length = conditioner.transformer.token_emb.num_embeddings, len(conditioner.null_ids)
    max_objects, crop = divmod(length, 3)
    return BoxTokenizer(vocab_size - 1, max_objects, vocab_size, encode_crop=crop == 2, use_group=False)


def describe(
    layouts: Sequence[tuple[str, list[LabelledBox]]],
    names: dict[str, int],
    loaded: LoadedModel,
    conditioner: LayoutConditioner | TokenConditioner,
    options: argparse.Namespace,
) -> Iterator[Drawing]:
    """Describe the drawings."""
    spelled = {label: name for name, label in names.items()}
    size, tiles = picture_size(loaded, options), []
    if options.tile is not None:
        height, width = (side // loaded.model.first_stage_model.factor for side in size)
        tiles = [Box(*tile) for tile in tile_boxes(height, width, loaded.model.model.spec.kernel[0])]
        loaded.model.cond_stage_model = TiledConditioner(conditioner, len(tiles))
    for path, layout in layouts:
        condition = embeddable(layout, conditioner, FULL_IMAGE)
        if tiles:
            parts = [embeddable(layout, conditioner, tile) for tile in tiles]
            condition = {key: torch.stack([part[key] for part in parts]) for key in condition}
        details = {"layout": str(path), "objects": [item._asdict() for item in layout]}
        texts = [spelled.get(item.label, str(item.label)) for item in layout]
        shown = draw_boxes([item.box for item in layout], size, texts)
        for _ in range(options.n_samples):
            yield Drawing(size, condition, details, beside=shown)


def embeddable(
    layout: Sequence[LabelledBox], conditioner: LayoutConditioner | TokenConditioner, crop: Box
) -> dict[str, Tensor]:
    """Return the batch entries of the part of a layout that a crop shows, as a conditioner reads them."""
    tokenizer = tokenizer_of(conditioner)
    if isinstance(conditioner, LayoutConditioner):
        seen = crop_layout(layout, crop, relative=not tokenizer.encode_crop)
        boxes, labels = box_tensors(seen, tokenizer.max_objects)
        crops = {conditioner.crop_key: torch.tensor(crop)} if tokenizer.encode_crop else {}
        return {conditioner.key: boxes, conditioner.labels_key: labels, **crops}
    objects = [LayoutObject(item.label, Box(*item.box)) for item in layout]
    return {conditioner.key: torch.tensor(tokenizer.build(objects, crop))}


if __name__ == "__main__":
    main()
