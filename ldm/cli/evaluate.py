"""Measure what a run has learned, with everything that the values depend on.

    ldm evaluate --run logs/RUN --n 1000 --metrics frechet precision_recall --out outputs/eval/run
    ldm evaluate --run logs/AUTOENCODER --metrics frechet psnr ssim lpips --out outputs/eval/first
    ldm evaluate --images IMAGES --reference PHOTOS --extractor inception --out outputs/eval/images
    torchrun --nproc_per_node 8 -- scripts/evaluate.py --run logs/RUN --n 50000 --extractor inception --out ...

data.key=value overrides the config of the run, e.g. data.params.validation.params.root=PHOTOS. It goes on where it was
stopped. Without the `--`, torchrun takes --run and --n for abbreviations of its own options.

OUT/evaluation.json     values, and everything that they depend on
OUT/samples.png         the first images
OUT/neighbours.png      samples, above their nearest training images by pixels and by features (--neighbours)
OUT/samples/            parts, from which an interrupted evaluation goes on; may be removed afterwards
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ldm import distributed
from ldm.cli.arguments import parse_with_overrides
from ldm.cli.entry import main_guard
from ldm.cli.options import (
    PRECISIONS,
    Defaults,
    OptionalSize,
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
from ldm.cli.sampling import image_size, warn_of_untrained_guidance
from ldm.conditioning.base import Conditioner
from ldm.conditioning.labels import ClassConditioner
from ldm.config.overrides import apply_overrides
from ldm.config.plain import resolve
from ldm.environment import environment
from ldm.errors import UserError
from ldm.evaluation import (
    MetricSuite,
    Result,
    Samples,
    evaluate_images,
    evaluate_reconstructions,
    evaluate_samples,
)
from ldm.evaluation.build import known_names, make_metric_suite
from ldm.evaluation.conditions import BalancedClasses, Conditions, DataConditions, Unconditional, UniformClasses
from ldm.evaluation.image_sets import ImageSet, folder_images, scaled_folder_images, split_images
from ldm.evaluation.memorisation import nearest_neighbours
from ldm.evaluation.references import ReferenceSet, data_reference, read_npz, write_npz
from ldm.images import image_grid, to_pil
from ldm.models.loading import ModelSource, is_first_stage, load_first_stage, load_model, read_config, train_option
from ldm.sampling.base import Sampler

_log = logging.getLogger(__name__)
_SPLITS = ("train", "validation", "test")
_FOR_SAMPLES = ("frechet", "spatial_frechet", "inception_score", "precision_recall")
_FOR_FIRST_STAGES = ("frechet", "inception_score", "psnr", "ssim")
_KEPT, _NEIGHBOURS = 64, 16
_DEFAULTS = Defaults("outputs/eval", steps=50)
_LONGEST_WAIT = timedelta(days=7)  # of a rank for the others, whose parts or search may take hours longer


@dataclass(frozen=True)
class SampleOptions:
    """Which samples are drawn: how, from which seed, of which size, and under which conditions."""

    sampler: Sampler
    guidance: float
    precision: str
    seed: int
    size: OptionalSize
    conditions: str

    def of_conditions(self) -> dict[str, bool]:
        """Return whether flags are given that only conditional models use."""
        flags = {f"--conditions {self.conditions}": self.conditions != "data"}
        return {**flags, f"--scale {self.guidance:g}": self.guidance != 1.0}


@dataclass(frozen=True)
class ReferenceOptions:
    """What images are compared with: a split of the data, a folder or a file; limit: so many images of it.

    cache: folder of its features; export: file that its moments are written to.
    """

    name: str
    limit: int | None
    cache: Path
    export: Path | None

    @property
    def is_split(self) -> bool:
        """Whether the reference is a split of the run's data."""
        return self.name in _SPLITS


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, by which metrics, against which reference, and where the result goes.

    count: of samples or images, None the usual; overrides: `data.key=value` of the run's config.
    """

    source: ModelSource
    metrics: tuple[str, ...]
    extractor: str
    count: int | None
    batch_size: int
    samples: SampleOptions
    reference: ReferenceOptions
    out: Path
    has_neighbours: bool
    overrides: tuple[str, ...]

    def suite(self, default: Sequence[str], device: torch.device) -> MetricSuite:
        """Return the metrics that were asked for. UserError where an option has no effect on them."""
        metrics, reference = make_metric_suite(self.metrics or default, self.extractor, device, _KEPT), self.reference
        if self.has_neighbours and metrics.extractor is None:
            raise UserError("--neighbours: are searched by features too; name a metric of features, such as frechet")
        if reference.export is not None and not metrics.needs_reference:
            raise UserError("--export-reference: no metric needs a reference; name one that does, such as frechet")
        if reference.export is not None and not reference.is_split and Path(reference.name).is_file():
            raise UserError(f"--export-reference: {reference.name} is such a file already; leave it out")
        return metrics

    def split(self, content: dict[str, Any], name: str, limit: int | None, replaces: bool = False) -> ImageSet:
        """Return a split of the run's data, with the overrides of the command line."""
        wrong = [word for word in self.overrides if not word.startswith("data.") or "=" not in word]
        if wrong:
            raise UserError(f"{wrong[0]}: is not understood; overrides are data.key=value")
        content = resolve(apply_overrides(content, self.overrides), throw_on_missing=False)
        return split_images(content, name, limit, replaces)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and log the values."""
    parser = _parser()
    given = parse_with_overrides(parser, argv)
    counts = {"--n": given.n, "--reference-n": given.reference_n, "--batch-size": given.batch_size}
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: use 1 or more")
    source = model_source(given.run, given.config, given.ckpt, given.raw)
    sampler = choose_sampler(given.sampler, given.ddim_steps, given.grid, given.ddim_eta, _DEFAULTS.eta)
    cache = given.cache or given.out.parent / "references"
    options = EvaluationOptions(
        source, tuple(given.metrics or ()), given.extractor, given.n, given.batch_size or 50,
        SampleOptions(sampler, given.scale, given.precision, given.seed, (given.H, given.W), given.conditions),
        ReferenceOptions(given.reference, given.reference_n, cache, given.export_reference),
        given.out, given.neighbours, tuple(given.overrides),
    )  # fmt: skip
    device = join_ranks(given.device)
    if given.images is not None:
        _refuse({"--first-stage": given.first_stage}, "--images")
        content = evaluate_folder(given.images, options, device)
    elif given.first_stage or is_first_stage(source):
        content = evaluate_first_stage(options, device)
    else:
        content = evaluate_model(options, device)
    for name, value in content["values"].items():
        _log.info("%-32s %.6g   %s", name, value, content["labels"][name])


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


def evaluate_folder(folder: str, options: EvaluationOptions, device: torch.device) -> dict[str, Any]:
    """Measure the images of a folder; return the content of OUT/evaluation.json, as the next two do."""
    _refuse({**options.samples.of_conditions(), "--neighbours": options.has_neighbours}, "--images")
    metrics, source = options.suite(_FOR_SAMPLES, device), options.source
    has_data = source.run is not None or source.config is not None
    if metrics.needs_reference and options.reference.is_split and not has_data:
        raise UserError("--reference: with --images alone name a folder or an .npz file, or give --run for its data")
    images = folder_images(folder, options.count)
    content = read_config(source) if has_data else {}
    reference = _reference(options, content, metrics, len(images), images.shape[1:])
    with progress(len(images), "images") as bar:
        parts = options.out / "samples"
        result = evaluate_images(images, metrics, reference, parts, options.batch_size, bar.update)
    return result.write(options.out, _made(device))


def evaluate_first_stage(options: EvaluationOptions, device: torch.device) -> dict[str, Any]:
    """Measure the reconstructions of an autoencoder."""
    reference = options.reference
    without_use = {**options.samples.of_conditions(), "--neighbours": options.has_neighbours}
    without_use[f"--reference {reference.name}"] = not reference.is_split
    without_use["--reference-n"] = reference.limit is not None
    _refuse(without_use, "a first stage, whose reference are the originals: a split of the data, --n of it")
    content, metrics = read_config(options.source), options.suite(_FOR_FIRST_STAGES, device)
    images = options.split(content, reference.name, options.count)
    metrics.check(len(images))
    loaded = load_first_stage(options.source, device)
    provenance, statistics = loaded.provenance(), _measured_reference(images, metrics, reference)
    with progress(len(images), "reconstructing") as bar:
        result = evaluate_reconstructions(
            loaded.autoencoder, images, metrics, statistics, options.out / "samples", _weights(provenance),
            options.batch_size, bar.update,
        )  # fmt: skip
    return result.write(options.out, {**_made(device), **_files(provenance)})


def evaluate_model(options: EvaluationOptions, device: torch.device) -> dict[str, Any]:
    """Measure samples of a latent diffusion model."""
    how, metrics = options.samples, options.suite(_FOR_SAMPLES, device)
    content, count = read_config(options.source), options.count or 1000
    loaded = load_model(options.source, device)
    conditions = _conditions(options, content, list(loaded.model.conditioners()))
    warn_of_untrained_guidance(loaded, options.source, how.guidance)
    samples = Samples(
        count, image_size(loaded, how.size), how.sampler, conditions, how.seed, how.guidance,
        options.batch_size, PRECISIONS[how.precision],
    )  # fmt: skip
    reference, provenance = _reference(options, content, metrics, count, samples.size), loaded.provenance()
    steps = len(how.sampler.times(loaded.model.process)) - 1
    with progress(count * steps, "sampling") as bar:
        result = evaluate_samples(
            loaded.model, samples, metrics, reference, options.out / "samples", _weights(provenance),
            lambda step: bar.update(len(step.x)),
        )  # fmt: skip
    more = _neighbours(options, content, metrics, result) if options.has_neighbours else {}
    return result.write(options.out, {**_made(device), **_files(provenance)}, **more)


def _refuse(given: Mapping[str, bool], what: str) -> None:
    """Raise UserError for flags that would be ignored."""
    unused = [flag for flag, is_given in given.items() if is_given]
    if unused:
        raise UserError(f"{', '.join(unused)}: is not used for {what}; leave it out")


def _reference(
    options: EvaluationOptions, content: dict[str, Any], metrics: MetricSuite, count: int, size: tuple[int, int]
) -> ReferenceSet | None:
    if not metrics.needs_reference:
        return None
    metrics.check(count)  # before a long reading
    reference = options.reference
    if reference.is_split:
        return _measured_reference(options.split(content, reference.name, reference.limit), metrics, reference)
    if Path(reference.name).is_dir():
        images = scaled_folder_images(reference.name, size, reference.limit, train_option(content, "value_range"))
        return _measured_reference(images, metrics, reference)
    if not Path(reference.name).is_file():
        raise UserError(f"--reference {reference.name}: is none of {', '.join(_SPLITS)}, no folder and no .npz file")
    return read_npz(Path(reference.name))


def _measured_reference(images: ImageSet, metrics: MetricSuite, options: ReferenceOptions) -> ReferenceSet | None:
    if not metrics.needs_reference:
        return None
    with progress(len(images), f"reference, {images.name}") as bar:
        reference = data_reference(images, metrics.extractor, options.cache, bar.update)
    if options.export is not None:
        write_npz(options.export, reference.statistics)
    return reference


def _conditions(options: EvaluationOptions, content: dict[str, Any], known: list[Conditioner]) -> Conditions:
    how = options.samples
    if not known:
        _refuse(how.of_conditions(), "a model without conditions")
        return Unconditional()
    if how.conditions == "data":
        return DataConditions(options.split(content, "validation", options.count or 1000))
    if len(known) != 1 or not isinstance(known[0], ClassConditioner):
        found = ", ".join(f"'{module.key}'" for module in known)
        raise UserError(f"--conditions {how.conditions}: is for classes, this model reads {found}; use data")
    labels = tuple(label for label in range(known[0].num_classes) if label != known[0].null_label)
    if how.conditions == "balanced":
        return BalancedClasses(known[0].key, labels)
    return UniformClasses(known[0].key, labels, how.seed)


def _neighbours(
    options: EvaluationOptions, content: dict[str, Any], metrics: MetricSuite, result: Result
) -> dict[str, Any]:
    """Search the training set on the first rank, write neighbours.png, and return the ratios."""
    if distributed.rank() != 0:
        return {}
    train = options.split(content, "train", options.reference.limit, replaces=True)
    held_out = options.split(content, "validation", len(result.images), replaces=True)
    with progress(len(train), "training images") as bar:
        found = nearest_neighbours(result.images, train, held_out, metrics.extractor, bar.update)
    rows = [result.images, *(nearest.images for nearest in found.values())]
    sheet = torch.cat([images[:_NEIGHBOURS] for images in rows])
    to_pil(image_grid(sheet, min(_NEIGHBOURS, len(result.images)))).save(options.out / "neighbours.png")
    ratios = {name: nearest.ratio for name, nearest in found.items()}
    return {"neighbours": {"ratio": ratios, "samples": len(result.images), "train": train.name, "of": len(train)}}


def _weights(provenance: dict[str, str]) -> dict[str, str]:
    """Return what values depend on: weights and config by content, and whether the weights are averaged."""
    with Path(provenance["config"]).open("rb") as file:
        config = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "weights": provenance["weights"],
        "checkpoint_sha256": provenance["checkpoint_sha256"],
        "config_sha256": config,
    }


def _files(provenance: dict[str, str]) -> dict[str, str]:
    return {"config": provenance["config"], "checkpoint": provenance["checkpoint"]}


def _made(device: torch.device) -> dict[str, Any]:
    return {**environment(), "device": str(device)}
