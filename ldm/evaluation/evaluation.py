"""Evaluate a diffusion model, an autoencoder, or a set of pictures: figures with everything that they depend on.

Work is done in parts (`ldm.evaluation.parts`): features and figures of each picture are kept as they are made, so that
an evaluation can be stopped, continued and spread over ranks without a change in its result. Sample i has seed
`seed + i`, so that none is drawn twice. All pictures are measured as bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoder.autoencoder import Autoencoder
from ldm.data.pixels import from_bytes, to_bytes
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.evaluation.conditions import Conditions, Unconditional
from ldm.evaluation.extractors import Extractor
from ldm.evaluation.generate import GenerativeModel, Request, generate
from ldm.evaluation.measures import SetMetric, Values
from ldm.evaluation.parts import Columns, Parts
from ldm.evaluation.picture_sets import ROUNDING, PictureSet
from ldm.evaluation.references import Referenced, columns_of, features_of
from ldm.sampling.base import Sampler, Step

PictureMetric = Callable[[Tensor, Mapping[str, Any]], Tensor]
Draw = Callable[[range], tuple[Tensor, Mapping[str, Any]]]
PUBLISHED_COUNT = 50_000
_FIGURE, _SECONDS = "figure.", "seconds"  # of each picture, and of the part, in the parts
_NAMES = {"frechet": "FID", "spatial_frechet": "sFID", "kernel": "KID", "inception_score": "IS"}


@dataclass(frozen=True, eq=False)
class Judges:
    """Say what is measured: figures of sets, by features of `extractor`, and of single pictures, by their names.

    `pictures`: images (B, C, H, W) in [-1, 1] and their batch -> one value each; mean and deviation are given. The
    first `keep` pictures are kept to be looked at.
    """

    sets: Mapping[str, SetMetric] = field(default_factory=dict)
    extractor: Extractor | None = None
    pictures: Mapping[str, PictureMetric] = field(default_factory=dict)
    keep: int = 64

    def check(self, count: int) -> None:
        """Raise UserError, before anything is read or drawn, if so many samples are too few, or nothing is asked."""
        if not self.sets and not self.pictures:
            raise UserError("evaluation: no metrics; name some")
        for name, metric in self.sets.items():
            if self.extractor is None:
                raise UserError(f"{name}: is measured on features; name an extractor")
            if count < metric.minimum:
                raise UserError(f"{name}: needs {metric.minimum} samples or more, there are {count}")

    def check_reference(self, reference: Referenced | None) -> None:
        """Raise UserError for a reference that is absent, or has too few pictures."""
        for name, metric in self.sets.items():
            if not metric.needs_reference:
                continue
            if reference is None:
                raise UserError(f"{name}: needs a reference; name a data set, a folder or an .npz file")
            number = reference.reference.count
            if number is not None and number < metric.minimum:
                raise UserError(f"{name}: needs {metric.minimum} pictures of reference or more, there are {number}")

    def record(self) -> dict[str, Any]:
        """Describe what is measured, as far as figures depend on it."""
        seen: dict[str, Any] = {"pixels": ROUNDING}
        if self.extractor is not None:
            seen["extractor"] = {
                "name": self.extractor.name, "sha256": self.extractor.hash, "resize": self.extractor.resize
            }  # fmt: skip
        seen["metrics"] = {name: asdict(metric) for name, metric in self.sets.items()}
        seen["metrics"] |= {name: {} for name in self.pictures}  # what else they depend on is part of the name
        return seen


@dataclass(frozen=True, eq=False)
class Samples:
    """Say which samples are drawn: `count` of size (height, width), seeds counting on from `seed`.

    scale: of classifier-free guidance; autocast: dtype of the network if it is not to be float32. `batch_size` changes
    speed and memory, not the samples.
    """

    count: int
    size: tuple[int, int]
    sampler: Sampler
    conditions: Conditions = Unconditional()
    seed: int = 0
    scale: float = 1.0
    batch_size: int = 50
    autocast: torch.dtype | None = None

    def record(self, schedule: Schedule) -> dict[str, Any]:
        """Describe the samples, as far as they depend on it."""
        grid = {key: getattr(value, "__name__", value) for key, value in asdict(self.sampler).items()}
        return {
            "kind": "samples",
            "seeds": [self.seed, self.seed + self.count - 1],
            "size": list(self.size),
            "sampler": {"name": type(self.sampler).__name__, "steps": schedule.num_steps, **grid},
            "guidance": self.scale,
            "conditions": self.conditions.name,
            "precision": "float32" if self.autocast is None else str(self.autocast).removeprefix("torch."),
        }


@dataclass(frozen=True, eq=False)
class Result:
    """Hold figures by name with the extractor in brackets, what they depend on, and the pictures kept (K, C, H, W).

    seconds: of drawing and of looking, all parts and ranks together, and of this call.
    """

    values: Values
    count: int
    settings: Mapping[str, Any]
    images: Tensor
    seconds: Mapping[str, float]

    def labels(self) -> dict[str, str]:
        """Say what each figure may be called: FID only by Inception, and FID-50k only of 50,000 samples."""
        return {name: label(name, self.count) for name in self.values}

    def content(self, made: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Give the result as plain values; `made`: when and by what, the only part that differs between repetitions."""
        figures = {"values": dict(self.values), "labels": self.labels(), "n": self.count}
        return {**figures, **self.settings, "made": {**(made or {}), **self.seconds}}

    def to_json(self, made: Mapping[str, Any] | None = None) -> str:
        """Give `content` as text."""
        return json.dumps(self.content(made), indent=2, ensure_ascii=False)


def label(name: str, count: int) -> str:
    """Give the usual name of a figure of Inception's, with the number of samples; its own name for all others."""
    figure, _, extractor = name.partition("[")
    is_deviation, figure = figure.endswith("_std"), figure.removesuffix("_std")
    if extractor != "inception]" or figure not in _NAMES:
        return f"{name}, {count:,} samples"
    number = "-50k" if count == PUBLISHED_COUNT else f" of {count:,} samples"
    return f"{'deviation of ' if is_deviation else ''}{_NAMES[figure]}{number}"


def evaluate_latent_diffusion(
    model: GenerativeModel,
    samples: Samples,
    judges: Judges,
    reference: Referenced | None,
    folder: Path,
    provenance: Mapping[str, Any],
    on_step: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Draw samples with the weights that a model has now, and measure them. Goes on with what `folder` holds.

    provenance: of the weights. UserError for mistakes, before anything is drawn where that can be known.
    """

    def draw(positions: range) -> tuple[Tensor, Mapping[str, Any]]:
        batch = samples.conditions(positions)
        seeds = [samples.seed + position for position in positions]
        request = Request(seeds, samples.size, batch, samples.scale, samples.batch_size, samples.autocast)
        drawn = [part.images for part in generate(model, samples.sampler, request, on_step)]
        return to_bytes(torch.cat(drawn)), batch

    settings = {**samples.record(model.schedule), "model": dict(provenance)}
    return _evaluate(draw, samples.count, samples.batch_size, settings, judges, reference, folder)


def evaluate_autoencoder(
    autoencoder: Autoencoder,
    pictures: PictureSet,
    judges: Judges,
    reference: Referenced | None,
    folder: Path,
    provenance: Mapping[str, Any],
    batch_size: int = 50,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> Result:
    """Encode (without noise) and decode all pictures of a set, and measure what comes back (rFID, PSNR, ...)."""
    device = next(autoencoder.parameters()).device

    @torch.no_grad()
    def draw(positions: range) -> tuple[Tensor, Mapping[str, Any]]:
        batch = pictures.batch(positions)
        original = to_bytes(batch["image"])
        rebuilt = autoencoder.decode(autoencoder.encode_mode(batch["image"].to(device)))
        on_pictures(len(positions))
        return to_bytes(rebuilt), {**batch, "image": from_bytes(original)}

    settings = {"kind": "reconstructions", "latent": "mode", "pictures": pictures.name, "model": dict(provenance)}
    return _evaluate(draw, len(pictures), batch_size, settings, judges, reference, folder)


def evaluate_pictures(
    pictures: PictureSet,
    judges: Judges,
    reference: Referenced | None,
    folder: Path,
    batch_size: int = 50,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> Result:
    """Measure pictures that are there already."""

    def draw(positions: range) -> tuple[Tensor, Mapping[str, Any]]:
        batch = pictures.batch(positions)
        on_pictures(len(positions))
        return to_bytes(batch["image"]), batch

    settings = {"kind": "pictures", "pictures": pictures.name, "sha256": pictures.digest()}
    return _evaluate(draw, len(pictures), batch_size, settings, judges, reference, folder)


def _evaluate(
    draw: Draw,
    count: int,
    part_size: int,
    settings: dict[str, Any],
    judges: Judges,
    reference: Referenced | None,
    folder: Path,
) -> Result:
    judges.check(count)
    judges.check_reference(reference)
    started = time.monotonic()
    settings = {**settings, **judges.record(), "reference": None if reference is None else reference.record}
    columns = Parts(folder, count, part_size, {"n": count, **settings}).run(lambda part: _look(draw, judges, part))
    values = _set_values(columns, judges, reference) | _picture_values(columns, judges.pictures)
    draw_seconds, look_seconds = columns[_SECONDS].sum(0).tolist()
    seconds = {"seconds": time.monotonic() - started, "draw_seconds": draw_seconds, "look_seconds": look_seconds}
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    return Result(values, count, settings, columns["images"], seconds)


@torch.no_grad()
def _look(draw: Draw, judges: Judges, positions: range) -> Columns:
    """Draw a part; keep what the figures need of it."""
    started = time.monotonic()
    images, batch = draw(positions)
    images = images.cpu()  # here, so that the accelerator's work counts as drawing
    drawn = time.monotonic()
    columns = {"images": images[: max(0, judges.keep - positions.start)]}
    if judges.sets:
        columns |= columns_of(judges.extractor(images))
    shown = from_bytes(images)
    for name, metric in judges.pictures.items():
        columns[_FIGURE + name] = metric(shown, batch).float()
    seconds = [drawn - started, time.monotonic() - drawn]
    return {**columns, _SECONDS: torch.tensor([seconds])}  # (1, 2)


def _set_values(columns: Columns, judges: Judges, reference: Referenced | None) -> Values:
    if not judges.sets:
        return {}
    features, real = features_of(columns), None if reference is None else reference.reference
    found = [metric(features, real) for metric in judges.sets.values()]
    return {f"{name}[{judges.extractor.name}]": value for part in found for name, value in part.items()}


def _picture_values(columns: Columns, names: Iterable[str]) -> Values:
    values = {}
    for name in names:
        figures = columns[_FIGURE + name].double()
        values |= {name: figures.mean().item(), f"{name}_std": figures.std(correction=0).item()}
    return values
