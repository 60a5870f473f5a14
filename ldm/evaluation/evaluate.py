"""Evaluate samples, reconstructions or given images: values of metrics with everything that they depend on.

Work is done in parts (see `resumable`): features and values of each image are kept as they are made, so that an
evaluation can be stopped, continued and divided among ranks without a change in its result. Sample i has seed
`seed + i`, so that none is drawn twice. All images are measured as bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import distributed
from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.evaluation.conditions import Conditions, Unconditional
from ldm.evaluation.distribution_metrics import DISTRIBUTION_METRICS
from ldm.evaluation.distributions import Values
from ldm.evaluation.image_sets import ImageSet
from ldm.evaluation.intervals import Spread, spread_of_scores
from ldm.evaluation.metric_suite import MetricSuite
from ldm.evaluation.names import USUAL_NAMES
from ldm.evaluation.references import ReferenceSet, columns_of, features_of
from ldm.evaluation.resumable import Columns, ResumableMap, wait_for_all
from ldm.images import image_grid, to_pil
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.models.generate import Request, generate
from ldm.models.guidance import Guidance
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.sampling.base import Sampler, Step

_log = logging.getLogger(__name__)
MakePart = Callable[[range], tuple[Tensor, Mapping[str, Any]]]  # positions -> bytes (B, C, H, W), their batch
PUBLISHED_COUNT = 50_000
RESULT = "evaluation.json"
_GRID_COLUMNS = 8
_PER_IMAGE, _SECONDS = "figure.", "seconds"  # names of columns in the parts
_FLOATS, _FILES = "floats of the model, rounded", "bytes of the files"


@dataclass(frozen=True, eq=False)
class Samples:
    """Which samples are drawn: `count` of size (height, width) in pixels, with seeds seed, seed + 1, ...

    scale: of classifier-free guidance, or any `Guidance`; autocast: half-precision dtype of the network, if any.
    `batch_size` and `graphs` (recorded calls of the network, on CUDA) change speed and memory, not the samples.
    """

    count: int
    size: tuple[int, int]
    sampler: Sampler
    conditions: Conditions = Unconditional()
    seed: int = 0
    scale: Guidance | float = 1.0
    batch_size: int = 50
    autocast: torch.dtype | None = None
    graphs: bool = True

    def settings(self, process: Process) -> dict[str, Any]:
        """Return all of this that samples depend on."""
        options = {key: getattr(value, "__name__", value) for key, value in asdict(self.sampler).items()}
        steps = {"steps": len(self.sampler.times(process)) - 1}
        return {
            "kind": "samples",
            "seeds": [self.seed, self.seed + self.count - 1],
            "size": list(self.size),
            "sampler": {"name": type(self.sampler).__name__, **options, **steps},
            "guidance": Guidance.of(self.scale).record(),
            "conditions": self.conditions.name,
            "conditions_sha256": self.conditions.sha256,
            "precision": "float32" if self.autocast is None else str(self.autocast).removeprefix("torch."),
        }


@dataclass(frozen=True, eq=False)
class Result:
    """Result of an evaluation.

    values: `metric[extractor]` or `metric` -> value; settings: everything that values depend on; images: the first K
    images, bytes (K, C, H, W); seconds: of making and of measuring images, summed over parts and ranks, and of this
    call; spreads: how far values are known, measured only when the content is asked for.
    """

    values: Values
    count: int
    settings: Mapping[str, Any]
    images: Tensor
    seconds: Mapping[str, float]
    spreads: Callable[[], Mapping[str, Spread]] = dict

    def labels(self) -> dict[str, str]:
        """Return what each value may be called: FID only by Inception, and FID-50k only of 50,000 samples."""
        kind, metrics = self.settings["kind"], self.settings["metrics"]
        return {name: label(name, self.count, kind, _is_usual(name, metrics)) for name in self.values}

    def content(self, made: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the result as plain values. made: time, machine, ..., all that differs between repetitions."""
        intervals = {name: spread.content() for name, spread in self.spreads().items()}
        content = {"values": dict(self.values), "intervals": intervals, "labels": self.labels(), "n": self.count}
        return {**content, **self.settings, "made": {**(made or {}), **self.seconds}}

    def write(self, folder: Path, made: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """Write `content` with more entries to evaluation.json and the images to samples.png; return the content."""
        content = {**self.content(made), **more}
        if distributed.rank() == 0:
            if len(self.images):
                to_pil(image_grid(self.images, _GRID_COLUMNS)).save(folder / "samples.png")
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / RESULT).write_text(text + "\n", encoding="utf-8")
        wait_for_all()
        return content


def label(name: str, count: int, kind: str = "samples", is_usual: bool = True) -> str:
    """Return the usual name of a value, with the number of samples; the given name for other extractors than the usual.

    is_usual: measured with the default options; kind: reconstructions have names of their own.
    """
    metric, _, extractor = name.partition("[")
    is_deviation, metric = metric.endswith("_std"), metric.removesuffix("_std")
    usual = USUAL_NAMES.get(metric)
    if usual is None or extractor != f"{usual.extractor}]" or not is_usual:
        return f"{name}, {count:,} {kind}{'' if is_usual else ', other options than usual'}"
    is_reconstruction = kind == "reconstructions"
    called = usual.of_reconstructions if is_reconstruction else usual.of_samples
    number = "-50k" if count == PUBLISHED_COUNT and not is_reconstruction else f" of {count:,} {kind}"
    return f"{'deviation of ' if is_deviation else ''}{called}{number}"


def _is_usual(name: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a value was measured with the default options of its metric."""
    metric = name.partition("[")[0].removesuffix("_std")
    return metric not in DISTRIBUTION_METRICS or metrics.get(metric) == asdict(DISTRIBUTION_METRICS[metric]())


def evaluate_samples(
    model: LatentDiffusion,
    samples: Samples,
    metrics: MetricSuite,
    reference: ReferenceSet | None,
    folder: Path,
    provenance: Mapping[str, Any],
    on_step: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Draw samples with the weights that a model has now, and measure them. Goes on with what `folder` holds.

    provenance: of the weights. UserError for mistakes, before anything is drawn where that can be known.
    """

    samples = replace(samples, scale=Guidance.of(samples.scale).ready(model))

    def draw(positions: range) -> tuple[Tensor, Mapping[str, Any]]:
        batch = samples.conditions(positions)
        seeds = [samples.seed + position for position in positions]
        how = (samples.scale, samples.batch_size, samples.autocast)
        request = Request(seeds, samples.size, batch, *how, graphs=samples.graphs)
        drawn = list(generate(model, samples.sampler, request, on_step))
        return to_bytes(torch.cat(drawn)), batch

    stage = model.first_stage_model
    channels = stage.latent_channels if isinstance(stage, IdentityAutoencoder) else stage.architecture.out_channels
    _check(metrics, samples.count, reference, samples.conditions(range(1)), (channels, *samples.size))
    settings = {**samples.settings(model.process), "pixels_from": _FLOATS, "model": dict(provenance)}
    return _evaluate(draw, samples.count, samples.batch_size, settings, metrics, reference, folder)


def evaluate_reconstructions(
    autoencoder: Autoencoder,
    images: ImageSet,
    metrics: MetricSuite,
    reference: ReferenceSet | None,
    folder: Path,
    provenance: Mapping[str, Any],
    batch_size: int = 50,
    on_images: Callable[[int], None] = lambda count: None,
) -> Result:
    """Encode (without noise) and decode all images of a set, and measure the reconstructions (rFID, PSNR, ...)."""
    device = next(autoencoder.parameters()).device

    @torch.no_grad()
    def reconstruct(positions: range) -> tuple[Tensor, Mapping[str, Any]]:
        batch = images.batch(positions)
        original = to_bytes(batch["image"])
        reconstructions = autoencoder.decode(autoencoder.encode_mode(batch["image"].to(device)))
        if not torch.isfinite(reconstructions).all():
            raise UserError("evaluation: the reconstructions are not finite numbers; check the weights")
        on_images(len(positions))
        return to_bytes(reconstructions), {**batch, "image": from_bytes(original)}

    _check(metrics, len(images), reference, images.batch([0]), images.shape)
    settings = {
        "kind": "reconstructions",
        "latent": "mode",
        "images": images.name,
        "data_sha256": images.data_digest(),
        "size": list(images.shape[1:]),
        "pixels_from": _FLOATS,
        "model": dict(provenance),
    }
    return _evaluate(reconstruct, len(images), batch_size, settings, metrics, reference, folder)


def evaluate_images(
    images: ImageSet,
    metrics: MetricSuite,
    reference: ReferenceSet | None,
    folder: Path,
    batch_size: int = 50,
    on_images: Callable[[int], None] = lambda count: None,
) -> Result:
    """Measure given images."""

    def read(positions: range) -> tuple[Tensor, Mapping[str, Any]]:
        batch = images.batch(positions)
        on_images(len(positions))
        return to_bytes(batch.pop("image")), batch  # images are not compared with themselves

    first = images.batch([0])
    del first["image"]
    _check(metrics, len(images), reference, first, images.shape)
    settings = {
        "kind": "images",
        "images": images.name,
        "sha256": images.digest(),
        "size": list(images.shape[1:]),
        "pixels_from": _FILES,
    }
    return _evaluate(read, len(images), batch_size, settings, metrics, reference, folder)


def _check(
    metrics: MetricSuite, count: int, reference: ReferenceSet | None, first: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    """Raise UserError for all that can be known beforehand; `first` is the batch of the first image."""
    metrics.check(count)
    metrics.check_reference(reference)
    metrics.check_batch(first, shape)
    size = None if reference is None else reference.provenance.get("size")
    if size is not None and tuple(size) != shape[1:]:
        _log.warning("images of %dx%d are compared with a reference of %dx%d", *shape[1:], *size)


def _evaluate(
    make: MakePart,
    count: int,
    part_size: int,
    settings: dict[str, Any],
    metrics: MetricSuite,
    reference: ReferenceSet | None,
    folder: Path,
) -> Result:
    started = time.monotonic()
    # Parts do not depend on metrics of sets and on the reference: others go on with the same samples.
    settings |= metrics.settings()
    of_parts = {"n": count, **settings, "metrics": metrics.image_settings()}
    settings["reference"] = None if reference is None else reference.provenance
    columns = ResumableMap(folder, count, part_size, of_parts).run(lambda part: _measure(make, metrics, part))
    of_sets = metrics.compare_sets(features_of(columns), reference) if metrics.sets else {}
    values = dict(of_sets)
    for name in metrics.images:
        scores = columns[_PER_IMAGE + name].double()
        values |= {name: scores.mean().item(), f"{name}_std": scores.std(correction=0).item()}
    spreads = partial(_spreads, metrics, of_sets, columns, reference)
    draw_seconds, look_seconds = columns[_SECONDS].sum(0).tolist()
    seconds = {"seconds": time.monotonic() - started, "draw_seconds": draw_seconds, "look_seconds": look_seconds}
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    return Result(values, count, settings, columns["images"], seconds, spreads)


def _spreads(
    metrics: MetricSuite, of_sets: Values, columns: Columns, reference: ReferenceSet | None
) -> dict[str, Spread]:
    """Return how far values are known, by name, where there are samples enough."""
    found = metrics.spreads(of_sets, features_of(columns), reference) if metrics.sets else {}
    for name in metrics.images:
        spread = spread_of_scores(columns[_PER_IMAGE + name].numpy())
        found |= {} if spread is None else {name: spread}
    return found


@torch.no_grad()
def _measure(make: MakePart, metrics: MetricSuite, positions: range) -> Columns:
    """Make a part of the images, and return what the metrics need of it."""
    started = time.monotonic()
    images, batch = make(positions)
    images = images.cpu()  # here, so that the accelerator's work counts as making
    made = time.monotonic()
    columns = {"images": images[: max(0, metrics.keep - positions.start)]}
    if metrics.sets:
        columns |= columns_of(metrics.extractor(images))
    columns |= {_PER_IMAGE + name: values for name, values in metrics.score_images(from_bytes(images), batch)}
    return {**columns, _SECONDS: torch.tensor([[made - started, time.monotonic() - made]])}  # (1, 2)
