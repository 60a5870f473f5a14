"""Evaluate what a run has learned, or a folder of pictures; `scripts/evaluate.py` is its command line.

OUT/evaluation.json     figures, and everything that they depend on
OUT/samples.png         the first pictures
OUT/neighbours.png      samples, above their nearest training pictures by pixels and by features (--neighbours)
OUT/samples/            parts, from which an interrupted evaluation goes on; may be removed afterwards
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
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
    choose_sampler,
    count_steps,
    main_guard,
    model_source,
    progress,
)
from ldm.cli.sampling import conditioners, picture_size, warn_of_untrained_guidance
from ldm.conditioning.base import Conditioner
from ldm.conditioning.labels import ClassConditioner
from ldm.environment import environment
from ldm.errors import UserError
from ldm.evaluation import build as parts
from ldm.evaluation.conditions import BalancedClasses, Conditions, DataConditions, Unconditional, UniformClasses
from ldm.evaluation.evaluation import (
    Judges,
    Result,
    Samples,
    evaluate_autoencoder,
    evaluate_latent_diffusion,
    evaluate_pictures,
)
from ldm.evaluation.image_sets import PictureSet
from ldm.evaluation.memorisation import nearest_neighbours
from ldm.evaluation.references import Referenced, data_reference, read_npz, write_npz
from ldm.evaluation.resumable import wait_for_all
from ldm.images import image_grid, to_pil
from ldm.models.loading import is_first_stage, load_first_stage, load_model, read_config, train_option

_log = logging.getLogger(__name__)
RESULT = "evaluation.json"
_SPLITS = ("train", "validation", "test")
_FOR_SAMPLES = ("frechet", "spatial_frechet", "inception_score", "precision_recall")
_FOR_FIRST_STAGES = ("frechet", "inception_score", "psnr", "ssim")
_GRID_COLUMNS, _KEPT, _NEIGHBOURS = 8, 64, 16


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and tell the figures."""
    content = evaluate(parse(argv))
    for name, value in content["values"].items():
        _log.info("%-32s %.6g   %s", name, value, content["labels"][name])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure samples of a diffusion model, reconstructions of an autoencoder, or a folder of pictures.",
        epilog="data.key=value overrides the config of the run, e.g. data.params.validation.params.root=PHOTOS.",
    )
    add = parser.add_argument
    add("--images", metavar="DIR", help="measure these pictures instead of a model's")
    add("--first-stage", action="store_true", help="measure the autoencoder inside a latent diffusion model")
    add("--n", type=int, help="samples (default 1000), or pictures to reconstruct or to read (default all)")
    add("--metrics", nargs="+", metavar="NAME", help="names, NAME:option=value, or dotted targets")
    add("--extractor", default="scenenet", metavar="NAME", help=f"{', '.join(parts.EXTRACTORS)} (default scenenet), "
        "with options as inception:weights=FILE")  # fmt: skip
    reference = "train, validation (default), test of the run's data; a folder; or an .npz file in ADM's format"
    add("--reference", metavar="WHAT", default="validation", help=reference)
    add("--reference-n", type=int, metavar="N", help="so many of its pictures, spread over all (default all)")
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
    """Do what `parse` read, and return the content of OUT/evaluation.json. UserError for mistakes."""
    device = parts.join_ranks(options)
    if options.images is not None:
        result, extra = _evaluate_images(options, device)
    elif options.first_stage or is_first_stage(model_source(options)):
        result, extra = _evaluate_first_stage(options, device)
    else:
        result, extra = _evaluate_samples(options, device)
    made = {**environment(), "device": str(device), **extra.pop("made", {})}
    content = {**result.content(made), **extra}
    if distributed.rank() == 0:
        if len(result.images):
            to_pil(image_grid(result.images, _GRID_COLUMNS)).save(options.out / "samples.png")
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (options.out / RESULT).write_text(text + "\n", encoding="utf-8")
    wait_for_all()
    return content


def _evaluate_images(options: argparse.Namespace, device: torch.device) -> tuple[Result, dict[str, Any]]:
    drawn = {**_of_conditions(options), "--neighbours": options.neighbours}
    _refuse({**drawn, "--first-stage": options.first_stage}, "--images")
    judges = _judges(options, _FOR_SAMPLES, device)
    has_data = options.run is not None or options.config is not None
    if judges.needs_reference and options.reference in _SPLITS and not has_data:
        raise UserError("--reference: with --images alone name a folder or an .npz file, or give --run for its data")
    pictures = parts.folder_set(options.images, options.n)
    content = read_config(model_source(options)) if has_data else {}
    reference = _reference(options, content, judges, len(pictures), pictures.shape[1:])
    with progress(len(pictures), "pictures") as bar:
        return evaluate_pictures(
            pictures, judges, reference, options.out / "samples", options.batch_size or 50, bar.update
        ), {}


def _evaluate_first_stage(options: argparse.Namespace, device: torch.device) -> tuple[Result, dict[str, Any]]:
    drawn = {**_of_conditions(options), "--neighbours": options.neighbours}
    others = {f"--reference {options.reference}": options.reference not in _SPLITS}
    others["--reference-n"] = options.reference_n is not None
    _refuse({**drawn, **others}, "a first stage, whose reference are the originals: a split of the data, --n of it")
    content, judges = read_config(model_source(options)), _judges(options, _FOR_FIRST_STAGES, device)
    pictures = _pictures(options, content, options.reference, options.n)
    judges.check(len(pictures))
    loaded = load_first_stage(model_source(options), device)
    reference = _referenced(pictures, judges, options)
    with progress(len(pictures), "reconstructing") as bar:
        return evaluate_autoencoder(
            loaded.autoencoder, pictures, judges, reference, options.out / "samples", _weights(loaded.provenance()),
            options.batch_size or 50, bar.update,
        ), {"made": _files(loaded.provenance())}  # fmt: skip


def _evaluate_samples(options: argparse.Namespace, device: torch.device) -> tuple[Result, dict[str, Any]]:
    sampler, judges = choose_sampler(options), _judges(options, _FOR_SAMPLES, device)
    content, count = read_config(model_source(options)), options.n or 1000
    loaded = load_model(model_source(options), device)
    conditions = _conditions(options, content, conditioners(loaded))
    warn_of_untrained_guidance(loaded, options)
    samples = Samples(
        count, picture_size(loaded, options), sampler, conditions, options.seed, options.scale,
        options.batch_size or 50, PRECISIONS[options.precision],
    )  # fmt: skip
    reference = _reference(options, content, judges, count, samples.size)
    with progress(count * count_steps(sampler, loaded.model.process), "sampling") as bar:
        result = evaluate_latent_diffusion(
            loaded.model, samples, judges, reference, options.out / "samples", _weights(loaded.provenance()),
            lambda step: bar.update(len(step.x)),
        )  # fmt: skip
    extra: dict[str, Any] = {"made": _files(loaded.provenance())}
    return result, extra | (_neighbours(options, content, judges, result) if options.neighbours else {})


def _of_conditions(options: argparse.Namespace) -> dict[str, bool]:
    """Return which flags are given that only mean something to a model with conditions."""
    choice, scale = options.conditions, options.scale
    return {f"--conditions {choice}": choice != "data", f"--scale {scale:g}": scale != 1.0}


def _refuse(given: Mapping[str, bool], what: str) -> None:
    """Refuse flags that would be ignored."""
    unused = [flag for flag, is_given in given.items() if is_given]
    if unused:
        raise UserError(f"{', '.join(unused)}: is not used for {what}; leave it out")


def _judges(options: argparse.Namespace, default: Sequence[str], device: torch.device) -> Judges:
    judges = parts.make_judges(options.metrics or default, options.extractor, device, _KEPT)
    if options.neighbours and judges.extractor is None:
        raise UserError("--neighbours: are also sought by features; name a metric of features, such as frechet")
    if options.export_reference is not None and not judges.needs_reference:
        raise UserError("--export-reference: no metric needs a reference; name one that does, such as frechet")
    if options.export_reference is not None and options.reference not in _SPLITS and Path(options.reference).is_file():
        raise UserError(f"--export-reference: {options.reference} is such a file already; leave it out")
    return judges


def _pictures(
    options: argparse.Namespace, content: dict[str, Any], split: str, limit: int | None, replaces: bool = False
) -> PictureSet:
    content = parts.with_overrides(content, options.overrides)
    return PictureSet(parts.data_set(content, split), f"data.params.{split}", limit, replaces)


def _reference(
    options: argparse.Namespace, content: dict[str, Any], judges: Judges, count: int, size: tuple[int, int]
) -> Referenced | None:
    if not judges.needs_reference:
        return None
    judges.check(count)  # before a long reading
    place = options.reference
    if place in _SPLITS:
        return _referenced(_pictures(options, content, place, options.reference_n), judges, options)
    if Path(place).is_dir():
        pictures = parts.scaled_folder_set(place, size, options.reference_n, train_option(content, "value_range"))
        return _referenced(pictures, judges, options)
    if not Path(place).is_file():
        raise UserError(f"--reference {place}: is none of {', '.join(_SPLITS)}, no folder and no .npz file")
    return read_npz(Path(place))


def _referenced(pictures: PictureSet, judges: Judges, options: argparse.Namespace) -> Referenced | None:
    if not judges.needs_reference:
        return None
    cache = options.cache or parts.default_cache(options.out)
    with progress(len(pictures), f"reference, {pictures.name}") as bar:
        reference = data_reference(pictures, judges.extractor, cache, bar.update)
    if options.export_reference is not None:
        write_npz(options.export_reference, reference.reference)
    return reference


def _conditions(options: argparse.Namespace, content: dict[str, Any], known: list[Conditioner]) -> Conditions:
    if not known:
        _refuse(_of_conditions(options), "a model without conditions")
        return Unconditional()
    if options.conditions == "data":
        return DataConditions(_pictures(options, content, "validation", options.n or 1000))
    if len(known) != 1 or not isinstance(known[0], ClassConditioner):
        found = ", ".join(f"'{module.key}'" for module in known)
        raise UserError(f"--conditions {options.conditions}: is for classes, this model reads {found}; use data")
    labels = tuple(label for label in range(known[0].num_classes) if label != known[0].null_label)
    if options.conditions == "balanced":
        return BalancedClasses(known[0].key, labels)
    return UniformClasses(known[0].key, labels, options.seed)


def _neighbours(options: argparse.Namespace, content: dict[str, Any], judges: Judges, result: Result) -> dict[str, Any]:
    """Search the training set on the first rank, draw what was found, and give the ratios."""
    if distributed.rank() != 0:
        return {}
    train = _pictures(options, content, "train", options.reference_n, replaces=True)
    held_out = _pictures(options, content, "validation", len(result.images), replaces=True)
    with progress(len(train), "training pictures") as bar:
        found = nearest_neighbours(result.images, train, held_out, judges.extractor, bar.update)
    shown = [result.images, *(nearest.pictures for nearest in found.values())]
    rows = torch.cat([images[:_NEIGHBOURS] for images in shown])
    to_pil(image_grid(rows, min(_NEIGHBOURS, len(result.images)))).save(options.out / "neighbours.png")
    ratios = {name: nearest.ratio for name, nearest in found.items()}
    return {"neighbours": {"ratio": ratios, "samples": len(result.images), "train": train.name, "of": len(train)}}


def _weights(provenance: dict[str, str]) -> dict[str, str]:
    """Pick what figures depend on: the weights and the config by content, and which of the weights."""
    with Path(provenance["config"]).open("rb") as file:
        config = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "weights": provenance["weights"],
        "checkpoint_sha256": provenance["checkpoint_sha256"],
        "config_sha256": config,
    }


def _files(provenance: dict[str, str]) -> dict[str, str]:
    return {"config": provenance["config"], "checkpoint": provenance["checkpoint"]}
