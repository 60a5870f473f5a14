"""Judge a model of configs/demo/txt2img_emoji_styles*.yaml: which held-out pairs of a concept and a style does it draw?

    python scripts/benchmarks/judge_emoji_styles.py --run logs/RUN --out outputs/emoji_styles

The nearest of all real images of the asked style, in the space of --extractor, is to be of the asked concept.
data.key=value overrides the data of the run's config.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import TaskParser, add_device_arguments, choose_device, progress
from ldm.evaluation.build import build_from_spec, known_names
from ldm.toy.emoji_styles import Pairs, judge
from ldm.toy.runs import Sampling, load_run


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Judge the run, and log what was found."""
    parser = TaskParser("judge_emoji_styles", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run of text to image")
    parser.add_argument("--out", type=Path, required=True, help="folder of judged.json and the sheets")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--sampler", default="dpm_solver", help="its name")
    parser.add_argument("--scale", type=float, default=3.0, help="of guidance")
    parser.add_argument("--limit", type=int, help="so many of the pairs (default all)")
    parser.add_argument("--extractor", default="shape_colour", help="the features, as for `ldm evaluate`")
    add_device_arguments(parser)
    given = parse_with_overrides(parser, argv)
    device, sampling = choose_device(given.device), Sampling(given.steps, given.scale, sampler=given.sampler)
    extractor = build_from_spec(given.extractor, known_names("EXTRACTORS"), "--extractor").to(device)
    pairs = Pairs.of_run(given.run, given.limit, given.overrides)
    content = judge(load_run(given.run, device).model, pairs, given.out, sampling, extractor, progress)
    logging.getLogger(__name__).info("%s", json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
