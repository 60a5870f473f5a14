"""Draw images of layouts: objects and their boxes (section 4.3.2).

    ldm layout2img --run logs/RUN --layout layout.json --n_samples 4
    ldm layout2img --config layout2img-openimages256/config.yaml --ckpt model.ckpt --layout layout.json

layout.json: [{"label": 3, "box": [left, top, width, height]}, ...] in fractions of the image, or a list of such
layouts; with --names a file of class names, {"name": "dog", "box": [...]} will do. The grid shows the boxes left of
the images. With --tile every tile of the denoiser gets its own part of the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli.entry import main_guard
from ldm.cli.options import Defaults, SamplingParser
from ldm.cli.sampling import (
    ImageRequest,
    load_for_sampling,
    require_conditioner,
    sample_into_folder,
    tile_side,
)
from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.text import TokenConditioner
from ldm.data.layout.boxes import FULL_IMAGE, Box, BoxTokenizer, LayoutObject, LayoutTokenizer
from ldm.data.layout.layout_files import LabelledBox, box_tensors, crop_layout, read_layouts, read_names
from ldm.images import draw_boxes
from ldm.models.tiled import tile, tile_boxes

_DEFAULTS = Defaults("outputs/layout2img", steps=200)
_NEEDED = "layouts need a LayoutConditioner, or a TokenConditioner of box tokens"
LayoutModel = LayoutConditioner | TokenConditioner


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draw n_samples images of every layout."""
    parser = SamplingParser("layout2img", __doc__, _DEFAULTS)
    add = parser.add_argument
    add("--layout", required=True, nargs="+", metavar="JSON", help="files of layouts")
    add("--names", metavar="FILE", help="class names in the order of their labels, a line each or JSON")
    given, options = parser.parse(argv)
    labels = read_names(given.names)
    loaded = load_for_sampling(replace(options, model=replace(options.model, tile=None)))
    conditioner = require_conditioner(loaded, (LayoutConditioner, TokenConditioner), _NEEDED)
    tokenizer, size, crops = _tokenizer(conditioner), loaded.size(options.size), None
    layouts = [
        (path, layout)
        for path in given.layout
        for layout in read_layouts(Path(path), labels, tokenizer.num_classes, tokenizer.max_objects)
    ]
    if options.model.tile is not None:
        side = tile_side(loaded, options.model.tile)
        crops = [Box(*box) for box in tile_boxes(loaded.model, side, size)]
        loaded = replace(loaded, model=tile(loaded.model, side, contexts_for=size))
    names = {label: name for name, label in labels.items()}
    requests = (
        _request(path, layout, _conditions(layout, conditioner, crops), size, names) for path, layout in layouts
    )
    sample_into_folder(loaded, requests, len(layouts), options, given.n_samples)


def _tokenizer(conditioner: LayoutModel) -> LayoutTokenizer:
    """Return the tokenizer of a model; the published one has boxes as tokens, whose classes are tokens themselves."""
    if isinstance(conditioner, LayoutConditioner):
        return conditioner.tokenizer
    vocab_size, length = conditioner.transformer.token_emb.num_embeddings, len(conditioner.null_ids)
    max_objects, crop = divmod(length, 3)
    return BoxTokenizer(vocab_size - 1, max_objects, vocab_size, encode_crop=crop == 2, use_group=False)


def _request(
    path: str,
    layout: Sequence[LabelledBox],
    conditions: dict[str, Tensor],
    size: tuple[int, int],
    names: dict[int, str],
) -> ImageRequest:
    texts = [names.get(item.label, str(item.label)) for item in layout]
    details = {"layout": str(path), "objects": [item._asdict() for item in layout]}
    return ImageRequest(size, conditions, details, source=draw_boxes([item.box for item in layout], size, texts))


def _conditions(
    layout: Sequence[LabelledBox], conditioner: LayoutModel, crops: Sequence[Box] | None
) -> dict[str, Tensor]:
    """Return the batch entries of a layout; with crops those of each, stacked."""
    if crops is None:
        return _entries(layout, conditioner, FULL_IMAGE)
    parts = [_entries(layout, conditioner, crop) for crop in crops]
    return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}


def _entries(layout: Sequence[LabelledBox], conditioner: LayoutModel, crop: Box) -> dict[str, Tensor]:
    """Return the batch entries of the part of a layout that a crop shows, as a conditioner reads them."""
    tokenizer = _tokenizer(conditioner)
    if isinstance(conditioner, LayoutConditioner):
        visible = crop_layout(layout, crop, relative=not tokenizer.encode_crop)
        boxes, labels = box_tensors(visible, tokenizer.max_objects)
        crops = {conditioner.crop_key: torch.tensor(crop)} if tokenizer.encode_crop else {}
        return {conditioner.key: boxes, conditioner.labels_key: labels, **crops}
    objects = [LayoutObject(item.label, Box(*item.box)) for item in layout]
    return {conditioner.key: torch.tensor(tokenizer.build(objects, crop))}
