"""Evaluate a run, its first stage, or a folder of images: from files and options to a result in a folder.

OUT/evaluation.json     values, and everything that they depend on
OUT/samples.png         the first images
OUT/neighbours.png      samples, above their nearest training images by pixels and by features
OUT/samples/            parts, from which an interrupted evaluation goes on; may be removed afterwards
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import distributed
from ldm.conditioning.base import Conditioner
from ldm.conditioning.labels import ClassConditioner
from ldm.config.overrides import apply_overrides
from ldm.config.plain import resolve
from ldm.environment import environment
from ldm.errors import UserError
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.conditions import BalancedClasses, Conditions, DataConditions, Unconditional, UniformClasses
from ldm.evaluation.evaluate import Result, Samples, evaluate_images, evaluate_reconstructions, evaluate_samples
from ldm.evaluation.image_sets import ImageSet, folder_images, scaled_folder_images, split_images
from ldm.evaluation.memorisation import nearest_neighbours
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.references import ReferenceSet, data_reference, read_npz, write_npz
from ldm.images import image_grid, to_pil
from ldm.models.loading import ModelSource, load_first_stage, load_model, read_config, train_option
from ldm.sampling.base import Sampler

SPLITS = ("train", "validation", "test")
_FOR_SAMPLES = ("frechet", "spatial_frechet", "inception_score", "precision_recall")
_FOR_FIRST_STAGES = ("frechet", "inception_score", "psnr", "ssim")
_KEPT, _NEIGHBOURS = 64, 16
Progress = Callable[[int, str], AbstractContextManager[Any]]  # of a number of steps and a title; has `update(n)`


@dataclass(frozen=True)
class SampleOptions:
    """Which samples are drawn: how, from which seed, of which size, and under which conditions.

    has_neighbours: whether the training set is searched for them.
    """

    sampler: Sampler
    guidance: float
    autocast: torch.dtype | None
    seed: int
    size: tuple[int | None, int | None]
    conditions: str
    has_neighbours: bool

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
        return self.name in SPLITS


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, by which metrics, against which reference, and where the result goes.

    count: of samples or images, None the usual; overrides: `data.key=value` of the run's config.
    """

    source: ModelSource
    device: torch.device
    metrics: tuple[str, ...]
    extractor: str
    count: int | None
    batch_size: int
    samples: SampleOptions
    reference: ReferenceOptions
    out: Path
    overrides: tuple[str, ...]

    def suite(self, default: Sequence[str]) -> MetricSuite:
        """Return the metrics that were asked for. UserError where an option has no effect on them."""
        metrics = make_metric_suite(self.metrics or default, self.extractor, self.device, _KEPT)
        reference = self.reference
        if self.samples.has_neighbours and metrics.extractor is None:
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


def evaluate_folder(folder: str, options: EvaluationOptions, progress: Progress) -> dict[str, Any]:
    """Measure the images of a folder; return the content of OUT/evaluation.json, as the next two do."""
    metrics, source = options.suite(_FOR_SAMPLES), options.source
    has_data = source.run is not None or source.config is not None
    if metrics.needs_reference and options.reference.is_split and not has_data:
        raise UserError("--reference: with --images alone name a folder or an .npz file, or give --run for its data")
    images = folder_images(folder, options.count)
    content = read_config(source) if has_data else {}
    reference = _reference(options, content, metrics, len(images), images.shape[1:], progress)
    with progress(len(images), "images") as bar:
        parts = options.out / "samples"
        result = evaluate_images(images, metrics, reference, parts, options.batch_size, bar.update)
    return result.write(options.out, _made(options.device))


def evaluate_first_stage(options: EvaluationOptions, progress: Progress) -> dict[str, Any]:
    """Measure the reconstructions of an autoencoder."""
    reference = options.reference
    without_use = {**options.samples.of_conditions(), "--neighbours": options.samples.has_neighbours}
    without_use[f"--reference {reference.name}"] = not reference.is_split
    without_use["--reference-n"] = reference.limit is not None
    refuse(without_use, "a first stage, whose reference are the originals: a split of the data, --n of it")
    content, metrics = read_config(options.source), options.suite(_FOR_FIRST_STAGES)
    images = options.split(content, reference.name, options.count)
    metrics.check(len(images))
    loaded = load_first_stage(options.source, options.device)
    provenance, statistics = loaded.provenance(), _measured_reference(images, metrics, reference, progress)
    with progress(len(images), "reconstructing") as bar:
        result = evaluate_reconstructions(
            loaded.autoencoder, images, metrics, statistics, options.out / "samples", _weights(provenance),
            options.batch_size, bar.update,
        )  # fmt: skip
    return result.write(options.out, {**_made(options.device), **_files(provenance)})


def evaluate_model(options: EvaluationOptions, progress: Progress) -> dict[str, Any]:
    """Measure samples of a latent diffusion model."""
    how, metrics = options.samples, options.suite(_FOR_SAMPLES)
    content, count = read_config(options.source), options.count or 1000
    loaded = load_model(options.source, options.device)
    conditions = _conditions(options, content, list(loaded.model.conditioners()))
    if options.source.run is not None:  # published configs do not say it
        loaded.warn_of_untrained_guidance(how.guidance)
    samples = Samples(
        count, loaded.size(how.size), how.sampler, conditions, how.seed, how.guidance,
        options.batch_size, how.autocast,
    )  # fmt: skip
    reference, provenance = _reference(options, content, metrics, count, samples.size, progress), loaded.provenance()
    steps = len(how.sampler.times(loaded.model.process)) - 1
    with progress(count * steps, "sampling") as bar:
        result = evaluate_samples(
            loaded.model, samples, metrics, reference, options.out / "samples", _weights(provenance),
            lambda step: bar.update(len(step.x)),
        )  # fmt: skip
    more = _neighbours(options, content, metrics, result, progress) if how.has_neighbours else {}
    return result.write(options.out, {**_made(options.device), **_files(provenance)}, **more)


def refuse(given: Mapping[str, bool], what: str) -> None:
    """Raise UserError for flags that would be ignored."""
    unused = [flag for flag, is_given in given.items() if is_given]
    if unused:
        raise UserError(f"{', '.join(unused)}: is not used for {what}; leave it out")


def _reference(
    options: EvaluationOptions,
    content: dict[str, Any],
    metrics: MetricSuite,
    count: int,
    size: tuple[int, int],
    progress: Progress,
) -> ReferenceSet | None:
    if not metrics.needs_reference:
        return None
    metrics.check(count)  # before a long reading
    reference = options.reference
    if reference.is_split:
        images = options.split(content, reference.name, reference.limit)
        return _measured_reference(images, metrics, reference, progress)
    if Path(reference.name).is_dir():
        images = scaled_folder_images(reference.name, size, reference.limit, train_option(content, "value_range"))
        return _measured_reference(images, metrics, reference, progress)
    if not Path(reference.name).is_file():
        raise UserError(f"--reference {reference.name}: is none of {', '.join(SPLITS)}, no folder and no .npz file")
    return read_npz(Path(reference.name))


def _measured_reference(
    images: ImageSet, metrics: MetricSuite, options: ReferenceOptions, progress: Progress
) -> ReferenceSet | None:
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
        refuse(how.of_conditions(), "a model without conditions")
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
    options: EvaluationOptions, content: dict[str, Any], metrics: MetricSuite, result: Result, progress: Progress
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
