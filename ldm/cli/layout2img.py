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

from ldm.cli.entry import main_guard
from ldm.cli.options import Defaults, SamplingParser
from ldm.cli.sampling import load_for_sampling, require_conditioner, sample_into_folder, tile_side
from ldm.conditioning.layout import LayoutConditioner
from ldm.conditioning.text import TokenConditioner
from ldm.data.layout.boxes import Box
from ldm.data.layout.layout_files import read_layouts, read_names
from ldm.models.image_request import ImageRequest
from ldm.models.tasks import layout_request, layout_tokenizer
from ldm.models.tiled import tile, tile_boxes

_DEFAULTS = Defaults("outputs/layout2img", steps=200)
_NEEDED = "layouts need a LayoutConditioner, or a TokenConditioner of box tokens"


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
    tokenizer, size, crops = layout_tokenizer(conditioner), loaded.size(options.size), None
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
    requests = (_request(path, layout_request(layout, conditioner, size, crops, names)) for path, layout in layouts)
    sample_into_folder(loaded, requests, len(layouts), options, given.n_samples)


def _request(path: str, request: ImageRequest) -> ImageRequest:
    return replace(request, details={"layout": str(path), **request.details})
