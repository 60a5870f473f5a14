"""Measure what a run has learned, with everything that the values depend on.

    ldm evaluate --run logs/RUN --n 1000 --metrics frechet precision_recall --out outputs/eval/run
    ldm evaluate --run logs/AUTOENCODER --metrics frechet psnr ssim lpips --out outputs/eval/first
    ldm evaluate --images IMAGES --reference PHOTOS --extractor inception --out outputs/eval/images
    torchrun --nproc_per_node 8 -- scripts/evaluate.py --run logs/RUN --n 50000 --extractor inception --out ...

data.key=value overrides the config of the run, e.g. data.params.validation.params.root=PHOTOS. It goes on where it was
stopped. Without the `--`, torchrun takes --run and --n for abbreviations of its own options.

OUT/evaluation.json     values, their 95% intervals over the samples, and everything that they depend on
OUT/samples.png         the first images
OUT/neighbours.png      samples, above their nearest training images by pixels and by features (--neighbours)
OUT/samples/            parts, from which an interrupted evaluation goes on; may be removed afterwards
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import (
    PRECISIONS,
    Defaults,
    TaskParser,
    add_device_arguments,
    add_model_arguments,
    add_sampler_arguments,
    add_seed_arguments,
    add_side_arguments,
    choose_device,
    choose_sampler,
    model_source,
    progress,
)
from ldm.config.trust import allow_own
from ldm.errors import UserError
from ldm.evaluation.build import known_names
from ldm.evaluation.intervals import interval_text
from ldm.evaluation.run import (
    EvaluationOptions,
    ReferenceOptions,
    SampleOptions,
    evaluate_first_stage,
    evaluate_folder,
    evaluate_model,
    refuse,
)
from ldm.models.guidance import Guidance
from ldm.models.loading import is_first_stage

_log = logging.getLogger(__name__)
_DEFAULTS = Defaults("outputs/eval", steps=50)
_LONGEST_WAIT = timedelta(days=7)  # of a rank for the others, whose parts or search may take hours longer


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and log the values."""
    given = parse_with_overrides(_parser(), argv)
    allow_own([*(given.metrics or ()), given.extractor])
    counts = {"--n": given.n, "--reference-n": given.reference_n, "--batch-size": given.batch_size}
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: use 1 or more")
    device = join_ranks(given.device)
    source = model_source(given)
    sampler = choose_sampler(given.sampler, given.ddim_steps, given.grid, given.ddim_eta, _DEFAULTS)
    cache = given.cache or given.out.parent / "references"
    size, autocast = (given.H, given.W), PRECISIONS[given.precision]
    guidance = Guidance.parse(given.scale, given.guidance, source.guide(given.guide), given.negative)
    how = (given.seed, given.conditions, given.neighbours, not given.no_graphs)
    samples = SampleOptions(sampler, guidance, size, autocast, *how)
    reference = ReferenceOptions(cache, given.reference, given.reference_n, given.export_reference)
    options = EvaluationOptions(
        source, device, tuple(given.metrics or ()), given.extractor, samples, reference, given.out, given.n,
        given.batch_size or 50, tuple(given.overrides),
    )  # fmt: skip
    if given.images is not None:
        unused = {"neighbours": given.neighbours, "first_stage": given.first_stage}
        refuse({**samples.of_conditions(), **unused}, "images")
        content = evaluate_folder(given.images, options, progress)
    elif given.first_stage or is_first_stage(source):
        content = evaluate_first_stage(options, progress)
    else:
        content = evaluate_model(options, progress)
    for name, value in content["values"].items():
        interval = interval_text(content["intervals"].get(name))
        _log.info("%-32s %-12.6g %-24s %s", name, value, interval, content["labels"][name])


def _parser() -> TaskParser:
    parser = TaskParser("evaluate", __doc__)
    add = parser.add_argument
    add("--images", metavar="DIR", help="measure these images instead of a model's")
    add("--first-stage", action="store_true", help="measure the autoencoder inside a latent diffusion model")
    add("--n", type=int, help="samples (default 1000), or images to reconstruct or to read (default all)")
    add("--metrics", nargs="+", metavar="NAME", help="names, NAME:option=value, or dotted targets")
    extractors = ", ".join(known_names("EXTRACTORS"))
    extractor = f"{extractors} (default scenenet), with options as inception:weights=FILE"
    add("--extractor", default="scenenet", metavar="NAME", help=extractor)
    reference = "train, validation (default), test of the run's data; a folder; or an .npz file in ADM's format"
    add("--reference", metavar="WHAT", default="validation", help=reference)
    add("--reference-n", type=int, metavar="N", help="so many of its images, evenly spaced (default all)")
    add("--export-reference", type=Path, metavar="FILE.npz", help="write the reference's moments in ADM's format")
    add("--conditions", choices=("data", "balanced", "uniform"), default="data", help="which conditions samples get")
    add("--neighbours", action="store_true", help="search the training set for the samples (memorisation)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the result; it goes on where it stopped")
    add("--cache", type=Path, metavar="DIR", help="features of references (default: OUT/../references)")
    add_model_arguments(parser)
    add_sampler_arguments(parser, _DEFAULTS)
    add_seed_arguments(add_side_arguments(parser), seed=0)
    add_device_arguments(parser)
    return parser


def join_ranks(device: str) -> torch.device:
    """Choose the device; under torchrun also meet the other processes, each with its own accelerator."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)  # files are exchanged, not tensors
    if device == "auto" and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    return choose_device(device)
