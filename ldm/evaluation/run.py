"""Evaluate a run, its first stage, or a folder of images: from files and options to a result in a folder.

OUT/evaluation.json     values, their 95% intervals over the samples, and everything that they depend on
OUT/samples.png         the first images
OUT/neighbours.png      samples, above their nearest training images by pixels and by features
OUT/samples/            parts, from which an interrupted evaluation goes on; may be removed afterwards
RUN/evaluations/        a copy of the result, if a run was evaluated
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import distributed
from ldm.conditioning.base import Conditioner
from ldm.conditioning.labels import ClassConditioner
from ldm.config.files import CONFIGS, EVALUATIONS, config_of_run
from ldm.config.overrides import apply_overrides
from ldm.config.plain import resolve
from ldm.environment import environment
from ldm.errors import UserError
from ldm.evaluation.build import make_metric_suite
from ldm.evaluation.conditions import BalancedClasses, Conditions, DataConditions, Unconditional, UniformClasses
from ldm.evaluation.evaluate import RESULT, Result, Samples, evaluate_images, evaluate_reconstructions, evaluate_samples
from ldm.evaluation.extractors import file_hash
from ldm.evaluation.image_sets import ImageSet, folder_images, scaled_folder_images, split_images
from ldm.evaluation.memorisation import nearest_neighbours
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.references import ReferenceSet, data_reference, read_npz, write_npz
from ldm.images import image_grid, to_pil
from ldm.models.guidance import Guidance
from ldm.models.loading import ModelSource, load_first_stage, load_model, read_config, train_option
from ldm.networks.layers import store_in_half
from ldm.sampling.base import Sampler
from ldm.writing import write_text

_log = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
_FOR_SAMPLES = ("frechet", "spatial_frechet", "inception_score", "precision_recall")
_FOR_FIRST_STAGES = ("frechet", "inception_score", "psnr", "ssim")
_KEPT, _NEIGHBOURS = 64, 16
Progress = Callable[[int, str], AbstractContextManager[Any]]  # of a number of steps and a title; has `update(n)`


@dataclass(frozen=True)
class SampleOptions:
    """Which samples are drawn: how, of which size (None: as trained), from which seed, under which conditions.

    conditions: data, balanced or uniform; neighbours: whether the training set is searched for them; graphs: whether
    calls of the network are recorded and replayed on CUDA.
    """

    sampler: Sampler
    guidance: Guidance = Guidance()
    size: tuple[int | None, int | None] = (None, None)
    autocast: torch.dtype | None = None
    seed: int = 0
    conditions: str = "data"
    neighbours: bool = False
    graphs: bool = True

    def of_conditions(self) -> dict[str, bool]:
        """Return whether options are given that only conditional models use."""
        is_guided = self.guidance.is_on and self.guidance.guide is None
        return {f"conditions {self.conditions}": self.conditions != "data", f"scale {self.guidance.scale:g}": is_guided}


@dataclass(frozen=True)
class ReferenceOptions:
    """What images are compared with: a split of the data, a folder or a file; limit: so many images of it.

    cache: folder of its features; export: file that its moments are written to.
    """

    cache: Path
    name: str = "validation"
    limit: int | None = None
    export: Path | None = None

    @property
    def is_split(self) -> bool:
        """Whether the reference is a split of the run's data."""
        return self.name in SPLITS


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, by which metrics (none: the usual), against which reference, and where the result goes.

    count: of samples or images, None the usual; overrides: `data.key=value` of the run's config.
    """

    source: ModelSource
    device: torch.device
    metrics: tuple[str, ...]
    extractor: str
    samples: SampleOptions
    reference: ReferenceOptions
    out: Path
    count: int | None = None
    batch_size: int = 50
    overrides: tuple[str, ...] = ()


def evaluate_folder(folder: str, options: EvaluationOptions, progress: Progress) -> dict[str, Any]:
    """Measure the images of a folder; return the content of OUT/evaluation.json, as the next two do."""
    has_data = options.source.run is not None or options.source.config is not None
    evaluation = _Evaluation.of(options, _FOR_SAMPLES, progress, has_data)
    if evaluation.metrics.needs_reference and options.reference.is_split and not has_data:
        raise UserError(
            "reference: of images alone name a folder or an .npz file, or give a run or config for its data"
        )
    images = folder_images(folder, options.count)
    reference = evaluation.reference(len(images), images.shape[1:])
    with progress(len(images), "images") as bar:
        result = evaluate_images(
            images, evaluation.metrics, reference, evaluation.parts, options.batch_size, bar.update
        )
    return evaluation.write(result)


def evaluate_first_stage(options: EvaluationOptions, progress: Progress) -> dict[str, Any]:
    """Measure the reconstructions of an autoencoder."""
    reference = options.reference
    without_use = {**options.samples.of_conditions(), "neighbours": options.samples.neighbours}
    without_use |= {f"reference {reference.name}": not reference.is_split, "reference_n": reference.limit is not None}
    refuse(without_use, "a first stage, whose reference are the originals: a split of the data, n of it")
    evaluation = _Evaluation.of(options, _FOR_FIRST_STAGES, progress)
    images = evaluation.split(reference.name, options.count)
    evaluation.metrics.check(len(images))
    loaded = load_first_stage(options.source, options.device)
    provenance, statistics = loaded.provenance(), evaluation.measured(images)
    with progress(len(images), "reconstructing") as bar:
        result = evaluate_reconstructions(
            loaded.autoencoder, images, evaluation.metrics, statistics, evaluation.parts, _weights(provenance),
            options.batch_size, bar.update,
        )  # fmt: skip
    return evaluation.write(result, provenance)


def evaluate_model(options: EvaluationOptions, progress: Progress) -> dict[str, Any]:
    """Measure samples of a latent diffusion model."""
    how, evaluation = options.samples, _Evaluation.of(options, _FOR_SAMPLES, progress)
    loaded, count = load_model(options.source, options.device), options.count or 1000
    conditions = evaluation.conditions(list(loaded.model.conditioners()), count)
    if options.source.run is not None:  # published configs do not say it
        how.guidance.warn_if_untrained(loaded.model)
    size, batch_size = loaded.size(how.size), options.batch_size
    guidance = how.guidance.ready(loaded.model)
    evaluations = guidance.evaluations(how.sampler, loaded.model.process)
    _log.info("each image takes %d evaluations of a network", evaluations)
    if how.autocast is not None:
        store_in_half(loaded.model.model, how.autocast)
    samples = Samples(count, size, how.sampler, conditions, how.seed, guidance, batch_size, how.autocast, how.graphs)
    reference, provenance = evaluation.reference(count, size), loaded.provenance()
    steps = len(how.sampler.times(loaded.model.process)) - 1
    with progress(count * steps, "sampling") as bar:
        result = evaluate_samples(
            loaded.model, samples, evaluation.metrics, reference, evaluation.parts, _weights(provenance),
            lambda step: bar.update(len(step.x)),
        )  # fmt: skip
    more = evaluation.neighbours(result) if how.neighbours else {}
    return evaluation.write(result, provenance, evaluations_per_image=evaluations, **more)


def refuse(given: Mapping[str, bool], what: str) -> None:
    """Raise UserError for options that would be ignored."""
    unused = [name for name, is_given in given.items() if is_given]
    if unused:
        raise UserError(f"{', '.join(unused)}: is not used for {what}; leave it out")


def _weights(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what values depend on: weights and config by content, adapters, and whether the weights are averaged."""
    kept = {name: provenance[name] for name in ("weights", "checkpoint_sha256", "adapters") if name in provenance}
    return {**kept, "config_sha256": file_hash(Path(provenance["config"]))}


@dataclass(frozen=True)
class _Evaluation:
    """Options with the metrics that they name, and the config of the run."""

    options: EvaluationOptions
    metrics: MetricSuite
    content: dict[str, Any]
    progress: Progress

    @classmethod
    def of(
        cls, options: EvaluationOptions, usual: Sequence[str], progress: Progress, has_data: bool = True
    ) -> _Evaluation:
        """Make the metrics, and read the config. UserError where an option has no effect."""
        metrics = make_metric_suite(options.metrics or usual, options.extractor, options.device, _KEPT)
        reference = options.reference
        if options.samples.neighbours and metrics.extractor is None:
            raise UserError("neighbours: are searched by features too; name a metric of features, such as frechet")
        if reference.export is not None and not metrics.needs_reference:
            raise UserError("export_reference: no metric needs a reference; name one that does, such as frechet")
        if reference.export is not None and not reference.is_split and Path(reference.name).is_file():
            raise UserError(f"export_reference: {reference.name} is such a file already; leave it out")
        wrong = [word for word in options.overrides if not word.startswith("data.") or "=" not in word]
        if wrong:
            raise UserError(f"{wrong[0]}: is not understood; overrides are data.key=value")
        return cls(options, metrics, read_config(options.source) if has_data else {}, progress)

    @property
    def parts(self) -> Path:
        return self.options.out / "samples"

    def split(self, name: str, limit: int | None, replaces: bool = False) -> ImageSet:
        """Return a split of the run's data, with the overrides."""
        content = resolve(apply_overrides(self.content, self.options.overrides), throw_on_missing=False)
        return split_images(content, name, limit, replaces)

    def reference(self, count: int, size: tuple[int, int]) -> ReferenceSet | None:
        """Return what `count` images of this size are compared with, None if no metric needs it."""
        if not self.metrics.needs_reference:
            return None
        self.metrics.check(count)  # before a long reading
        given = self.options.reference
        if given.is_split:
            return self.measured(self.split(given.name, given.limit))
        if Path(given.name).is_dir():
            value_range = train_option(self.content, "value_range")
            return self.measured(scaled_folder_images(given.name, size, given.limit, value_range))
        if not Path(given.name).is_file():
            raise UserError(f"reference {given.name}: is none of {', '.join(SPLITS)}, no folder and no .npz file")
        return read_npz(Path(given.name))

    def measured(self, images: ImageSet) -> ReferenceSet | None:
        """Return the statistics of images, None if no metric needs them; export them where that is asked for."""
        if not self.metrics.needs_reference:
            return None
        self.metrics.check_source(images.name)  # before they are read
        given = self.options.reference
        with self.progress(len(images), f"reference, {images.name}") as bar:
            reference = data_reference(images, self.metrics.extractor, given.cache, bar.update)
        if given.export is not None:
            write_npz(given.export, reference.statistics)
        return reference

    def conditions(self, known: Sequence[Conditioner], count: int) -> Conditions:
        """Return what samples are conditioned on. UserError for a choice that the model does not have."""
        how = self.options.samples
        if not known:
            refuse(how.of_conditions(), "a model without conditions")
            return Unconditional()
        if how.conditions == "data":
            return DataConditions(self.split("validation", count))
        if len(known) != 1 or not isinstance(known[0], ClassConditioner):
            found = ", ".join(f"'{module.key}'" for module in known)
            raise UserError(f"conditions {how.conditions}: is for classes, this model reads {found}; use data")
        labels = tuple(label for label in range(known[0].num_classes) if label != known[0].null_label)
        if how.conditions == "balanced":
            return BalancedClasses(known[0].key, labels)
        return UniformClasses(known[0].key, labels, how.seed)

    def neighbours(self, result: Result) -> dict[str, Any]:
        """Search the training set on the first rank, write neighbours.png, and return the ratios."""
        if distributed.rank() != 0:
            return {}
        samples = result.images
        train = self.split("train", self.options.reference.limit, replaces=True)
        held_out = self.split("validation", len(samples), replaces=True)
        with self.progress(len(train), "training images") as bar:
            found = nearest_neighbours(samples, train, held_out, self.metrics.extractor, bar.update)
        sheet = torch.cat([row[:_NEIGHBOURS] for row in (samples, *(nearest.images for nearest in found.values()))])
        to_pil(image_grid(sheet, min(_NEIGHBOURS, len(samples)))).save(self.options.out / "neighbours.png")
        ratios = {name: nearest.ratio for name, nearest in found.items()}
        return {"neighbours": {"ratio": ratios, "samples": len(samples), "train": train.name, "of": len(train)}}

    def write(self, result: Result, provenance: Mapping[str, str] | None = None, **more: Any) -> dict[str, Any]:
        """Write the result into OUT with machine and files; return its content."""
        files = {name: provenance[name] for name in ("config", "checkpoint")} if provenance else {}
        place = {"folder": str(self.options.out.resolve())}
        made = {**environment(), "device": str(self.options.device), **place, **files}
        content = result.write(self.options.out, made, **more)
        if provenance and self.options.source.run is not None and distributed.rank() == 0:
            note_in_run(self.options.source.run, self.options.out)
        return content


def note_in_run(run: str | Path, out: Path) -> None:
    """Copy the result in a folder OUT into the run folder that it is of: RUN/evaluations/<OUT>-<hash of the path>/.

    There the run is known by its evaluations, whatever logged its training (see `ldm.training.loggers`). Models that
    are in no run folder, and results that are in it already, are left as they are.
    """
    config = config_of_run(run)
    if config is None or config.parent.name != CONFIGS:
        return
    folder, out = config.parent.parent, out.resolve()
    place = folder / EVALUATIONS / f"{out.name}-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}"
    if out.is_relative_to(folder.resolve()) or place.parent.is_symlink() or place.is_symlink():
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / RESULT, (out / RESULT).read_text(encoding="utf-8"))
    except OSError as error:
        _log.warning("%s: the result is not noted in the run (%s)", place, error.strerror)
