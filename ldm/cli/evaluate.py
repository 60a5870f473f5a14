"""Evaluate what a run has learned, or a folder of images: arguments, and which functions of `ldm.evaluation` they mean.

OUT/evaluation.json     values, and everything that they depend on
OUT/samples.png         the first images
OUT/neighbours.png      samples, above their nearest training images by pixels and by features (--neighbours)
OUT/samples/            parts, from which an interrupted evaluation goes on; may be removed afterwards
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ldm import distributed
from ldm.cli.arguments import parse_with_overrides
from ldm.cli.common import (
    PRECISIONS,
    add_device_arguments,
    add_model_arguments,
    add_sampler_arguments,
    add_seed_arguments,
    add_side_arguments,
    choose_device,
    choose_sampler,
    count_steps,
    main_guard,
    model_source,
    progress,
)
from ldm.cli.sampling import conditioners, picture_size, warn_of_untrained_guidance
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
from ldm.models.loading import is_first_stage, load_first_stage, load_model, read_config, train_option

_log = logging.getLogger(__name__)
_SPLITS = ("train", "validation", "test")
_FOR_SAMPLES = ("frechet", "spatial_frechet", "inception_score", "precision_recall")
_FOR_FIRST_STAGES = ("frechet", "inception_score", "psnr", "ssim")
_KEPT, _NEIGHBOURS = 64, 16
_LONGEST_WAIT = timedelta(days=7)  # of a rank for the others, whose parts or search may take hours longer


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and log the values."""
    content = evaluate(parse(argv))
    for name, value in content["values"].items():
        _log.info("%-32s %.6g   %s", name, value, content["labels"][name])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line. UserError for counts below 1."""
    parser = argparse.ArgumentParser(
        description="Measure samples of a diffusion model, reconstructions of an autoencoder, or a folder of images.",
        epilog="data.key=value overrides the config of the run, e.g. data.params.validation.params.root=PHOTOS.",
    )
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
    add_sampler_arguments(parser, steps=50, eta=0.0, scale=1.0)
    add_seed_arguments(add_side_arguments(parser), seed=0)
    add_device_arguments(parser)
    options = parse_with_overrides(parser, argv)
    counts = {"--n": options.n, "--reference-n": options.reference_n, "--batch-size": options.batch_size}
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: use 1 or more")
    return options


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Do what `parse` returned, and return the content of OUT/evaluation.json. UserError for mistakes."""
    device = join_ranks(options.device)
    if options.images is not None:
        result, more = _evaluate_images(options, device)
    elif options.first_stage or is_first_stage(model_source(options)):
        result, more = _evaluate_first_stage(options, device)
    else:
        result, more = _evaluate_samples(options, device)
    made = {**environment(), "device": str(device), **more.pop("made", {})}
    return result.write(options.out, made, **more)


def join_ranks(device: str) -> torch.device:
    """Choose the device; under torchrun also meet the other processes, each with its own accelerator."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)  # files are exchanged, not tensors
    if device == "auto" and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    return choose_device(device)


def _evaluate_images(options: argparse.Namespace, device: torch.device) -> tuple[Result, dict[str, Any]]:
    without_use = {**_of_conditions(options), "--neighbours": options.neighbours}
    _refuse({**without_use, "--first-stage": options.first_stage}, "--images")
    metrics = _metrics(options, _FOR_SAMPLES, device)
    has_data = options.run is not None or options.config is not None
    if metrics.needs_reference and options.reference in _SPLITS and not has_data:
        raise UserError("--reference: with --images alone name a folder or an .npz file, or give --run for its data")
    images = folder_images(options.images, options.n)
    content = read_config(model_source(options)) if has_data else {}
    reference = _reference(options, content, metrics, len(images), images.shape[1:])
    with progress(len(images), "images") as bar:
        return evaluate_images(
            images, metrics, reference, options.out / "samples", options.batch_size or 50, bar.update
        ), {}


def _evaluate_first_stage(options: argparse.Namespace, device: torch.device) -> tuple[Result, dict[str, Any]]:
    without_use = {**_of_conditions(options), "--neighbours": options.neighbours}
    without_use[f"--reference {options.reference}"] = options.reference not in _SPLITS
    without_use["--reference-n"] = options.reference_n is not None
    _refuse(without_use, "a first stage, whose reference are the originals: a split of the data, --n of it")
    content, metrics = read_config(model_source(options)), _metrics(options, _FOR_FIRST_STAGES, device)
    images = _split(options, content, options.reference, options.n)
    metrics.check(len(images))
    loaded = load_first_stage(model_source(options), device)
    reference = _measured_reference(images, metrics, options)
    with progress(len(images), "reconstructing") as bar:
        return evaluate_reconstructions(
            loaded.autoencoder, images, metrics, reference, options.out / "samples", _weights(loaded.provenance()),
            options.batch_size or 50, bar.update,
        ), {"made": _files(loaded.provenance())}  # fmt: skip


def _evaluate_samples(options: argparse.Namespace, device: torch.device) -> tuple[Result, dict[str, Any]]:
    sampler, metrics = choose_sampler(options), _metrics(options, _FOR_SAMPLES, device)
    content, count = read_config(model_source(options)), options.n or 1000
    loaded = load_model(model_source(options), device)
    conditions = _conditions(options, content, conditioners(loaded))
    warn_of_untrained_guidance(loaded, options)
    samples = Samples(
        count, picture_size(loaded, options), sampler, conditions, options.seed, options.scale,
        options.batch_size or 50, PRECISIONS[options.precision],
    )  # fmt: skip
    reference = _reference(options, content, metrics, count, samples.size)
    with progress(count * count_steps(sampler, loaded.model.process), "sampling") as bar:
        result = evaluate_samples(
            loaded.model, samples, metrics, reference, options.out / "samples", _weights(loaded.provenance()),
            lambda step: bar.update(len(step.x)),
        )  # fmt: skip
    more: dict[str, Any] = {"made": _files(loaded.provenance())}
    return result, more | (_neighbours(options, content, metrics, result) if options.neighbours else {})


def _of_conditions(options: argparse.Namespace) -> dict[str, bool]:
    """Return whether flags are given that only conditional models use."""
    choice, scale = options.conditions, options.scale
    return {f"--conditions {choice}": choice != "data", f"--scale {scale:g}": scale != 1.0}


def _refuse(given: Mapping[str, bool], what: str) -> None:
    """Raise UserError for flags that would be ignored."""
    unused = [flag for flag, is_given in given.items() if is_given]
    if unused:
        raise UserError(f"{', '.join(unused)}: is not used for {what}; leave it out")


def _metrics(options: argparse.Namespace, default: Sequence[str], device: torch.device) -> MetricSuite:
    metrics = make_metric_suite(options.metrics or default, options.extractor, device, _KEPT)
    if options.neighbours and metrics.extractor is None:
        raise UserError("--neighbours: are searched by features too; name a metric of features, such as frechet")
    if options.export_reference is not None and not metrics.needs_reference:
        raise UserError("--export-reference: no metric needs a reference; name one that does, such as frechet")
    if options.export_reference is not None and options.reference not in _SPLITS and Path(options.reference).is_file():
        raise UserError(f"--export-reference: {options.reference} is such a file already; leave it out")
    return metrics


def _split(
    options: argparse.Namespace, content: dict[str, Any], split: str, limit: int | None, replaces: bool = False
) -> ImageSet:
    """Return a split of the run's data, with the overrides of the command line."""
    wrong = [word for word in options.overrides if not word.startswith("data.") or "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]}: is not understood; overrides are data.key=value")
    content = resolve(apply_overrides(content, options.overrides), throw_on_missing=False)
    return split_images(content, split, limit, replaces)


def _reference(
    options: argparse.Namespace, content: dict[str, Any], metrics: MetricSuite, count: int, size: tuple[int, int]
) -> ReferenceSet | None:
    if not metrics.needs_reference:
        return None
    metrics.check(count)  # before a long reading
    place = options.reference
    if place in _SPLITS:
        return _measured_reference(_split(options, content, place, options.reference_n), metrics, options)
    if Path(place).is_dir():
        images = scaled_folder_images(place, size, options.reference_n, train_option(content, "value_range"))
        return _measured_reference(images, metrics, options)
    if not Path(place).is_file():
        raise UserError(f"--reference {place}: is none of {', '.join(_SPLITS)}, no folder and no .npz file")
    return read_npz(Path(place))


def _measured_reference(images: ImageSet, metrics: MetricSuite, options: argparse.Namespace) -> ReferenceSet | None:
    if not metrics.needs_reference:
        return None
    cache = options.cache or options.out.parent / "references"
    with progress(len(images), f"reference, {images.name}") as bar:
        reference = data_reference(images, metrics.extractor, cache, bar.update)
    if options.export_reference is not None:
        write_npz(options.export_reference, reference.statistics)
    return reference


def _conditions(options: argparse.Namespace, content: dict[str, Any], known: list[Conditioner]) -> Conditions:
    if not known:
        _refuse(_of_conditions(options), "a model without conditions")
        return Unconditional()
    if options.conditions == "data":
        return DataConditions(_split(options, content, "validation", options.n or 1000))
    if len(known) != 1 or not isinstance(known[0], ClassConditioner):
        found = ", ".join(f"'{module.key}'" for module in known)
        raise UserError(f"--conditions {options.conditions}: is for classes, this model reads {found}; use data")
    labels = tuple(label for label in range(known[0].num_classes) if label != known[0].null_label)
    if options.conditions == "balanced":
        return BalancedClasses(known[0].key, labels)
    return UniformClasses(known[0].key, labels, options.seed)


def _neighbours(
    options: argparse.Namespace, content: dict[str, Any], metrics: MetricSuite, result: Result
) -> dict[str, Any]:
    """Search the training set on the first rank, write neighbours.png, and return the ratios."""
    if distributed.rank() != 0:
        return {}
    train = _split(options, content, "train", options.reference_n, replaces=True)
    held_out = _split(options, content, "validation", len(result.images), replaces=True)
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
