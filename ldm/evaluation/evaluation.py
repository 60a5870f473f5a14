"""Evaluate a diffusion model, an autoencoder, or a set of pictures: figures with everything that they depend on.

Work is done in parts (see `resumable`): features and figures of each picture are kept as they are made, so that
an evaluation can be stopped, continued and spread over ranks without a change in its result. Sample i has seed
`seed + i`, so that none is drawn twice. All pictures are measured as bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.core.pixels import from_bytes, to_bytes
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.evaluation.conditions import Conditions, Unconditional
from ldm.evaluation.distribution_metrics import SET_METRICS, Values
from ldm.evaluation.image_sets import PictureSet
from ldm.evaluation.metric_suite import Judges
from ldm.evaluation.references import Referenced, columns_of, features_of
from ldm.evaluation.resumable import Columns, Parts
from ldm.models.autoencoder import Autoencoder, IdentityAutoencoder
from ldm.models.generate import Request, generate
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.sampling.base import Sampler, Step

_log = logging.getLogger(__name__)
Draw = Callable[[range], tuple[Tensor, Mapping[str, Any]]]
PUBLISHED_COUNT = 50_000
_FIGURE, _SECONDS = "figure.", "seconds"  # of each picture, and of the part, in the parts
_NAMES = {"frechet": "FID", "spatial_frechet": "sFID", "kernel": "KID", "inception_score": "IS"}
_OF_REBUILT = {"frechet": "rFID", "spatial_frechet": "r-sFID", "kernel": "rKID", "inception_score": "R-IS"}
_FLOATS, _FILES = "floats of the model, rounded", "bytes of the files"


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

    def record(self, process: Process) -> dict[str, Any]:
        """Describe the samples, as far as they depend on it."""
        grid = {key: getattr(value, "__name__", value) for key, value in asdict(self.sampler).items()}
        return {
            "kind": "samples",
            "seeds": [self.seed, self.seed + self.count - 1],
            "size": list(self.size),
            "sampler": {"name": type(self.sampler).__name__, "steps": process.num_steps, **grid},
            "guidance": self.scale,
            "conditions": self.conditions.name,
            "conditions_sha256": self.conditions.sha256,
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
        kind, metrics = self.settings["kind"], self.settings["metrics"]
        return {name: label(name, self.count, kind, _is_usual(name, metrics)) for name in self.values}

    def content(self, made: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the result as plain values; `made`: when and by what, all that differs between repetitions."""
        figures = {"values": dict(self.values), "labels": self.labels(), "n": self.count}
        return {**figures, **self.settings, "made": {**(made or {}), **self.seconds}}

    def to_json(self, made: Mapping[str, Any] | None = None) -> str:
        """Return `content` as text."""
        return json.dumps(self.content(made), indent=2, ensure_ascii=False)


def label(name: str, count: int, kind: str = "samples", is_usual: bool = True) -> str:
    """Return the usual name of a figure of Inception's, with the number of samples; its own name for all others.

    is_usual: measured with the usual options; kind: reconstructions have names of their own.
    """
    figure, _, extractor = name.partition("[")
    is_deviation, figure = figure.endswith("_std"), figure.removesuffix("_std")
    if extractor != "inception]" or figure not in _NAMES or not is_usual:
        return f"{name}, {count:,} {kind}{'' if is_usual else ', other options than usual'}"
    is_rebuilt = kind == "reconstructions"
    usual = (_OF_REBUILT if is_rebuilt else _NAMES)[figure]
    number = "-50k" if count == PUBLISHED_COUNT and not is_rebuilt else f" of {count:,} {kind}"
    return f"{'deviation of ' if is_deviation else ''}{usual}{number}"


def _is_usual(name: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a figure was measured with the default options of its metric."""
    metric = name.partition("[")[0].removesuffix("_std")
    return metric not in SET_METRICS or metrics.get(metric) == asdict(SET_METRICS[metric]())


def evaluate_latent_diffusion(
    model: LatentDiffusion,
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

    stage = model.first_stage_model
    channels = stage.latent_channels if isinstance(stage, IdentityAutoencoder) else stage.architecture.out_channels
    _check(judges, samples.count, reference, samples.conditions(range(1)), (channels, *samples.size))
    settings = {**samples.record(model.process), "pixels_from": _FLOATS, "model": dict(provenance)}
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
        if not torch.isfinite(rebuilt).all():
            raise UserError("evaluation: the reconstructions are not finite numbers; check the weights")
        on_pictures(len(positions))
        return to_bytes(rebuilt), {**batch, "image": from_bytes(original)}

    _check(judges, len(pictures), reference, pictures.batch([0]), pictures.shape)
    settings = {
        "kind": "reconstructions",
        "latent": "mode",
        "pictures": pictures.name,
        "data_sha256": pictures.data_digest(),
        "size": list(pictures.shape[1:]),
        "pixels_from": _FLOATS,
        "model": dict(provenance),
    }
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
        return to_bytes(batch.pop("image")), batch  # pictures are not compared with themselves

    first = pictures.batch([0])
    del first["image"]
    _check(judges, len(pictures), reference, first, pictures.shape)
    settings = {
        "kind": "pictures",
        "pictures": pictures.name,
        "sha256": pictures.digest(),
        "size": list(pictures.shape[1:]),
        "pixels_from": _FILES,
    }
    return _evaluate(draw, len(pictures), batch_size, settings, judges, reference, folder)


def _check(
    judges: Judges, count: int, reference: Referenced | None, first: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    """Raise UserError for all that can be known beforehand; `first` is the batch of the first picture."""
    judges.check(count)
    judges.check_reference(reference)
    judges.check_pictures(first, shape)
    size = None if reference is None else reference.record.get("size")
    if size is not None and tuple(size) != shape[1:]:
        _log.warning("pictures of %dx%d are held against a reference of %dx%d", *shape[1:], *size)


def _evaluate(
    draw: Draw,
    count: int,
    part_size: int,
    settings: dict[str, Any],
    judges: Judges,
    reference: Referenced | None,
    folder: Path,
) -> Result:
    started = time.monotonic()
    # What parts hold does not depend on figures of sets and reference: others go on with the same samples.
    settings |= judges.record()
    kept = {"n": count, **settings, "metrics": judges.record_of_pictures()}
    settings["reference"] = None if reference is None else reference.record
    columns = Parts(folder, count, part_size, kept).run(lambda part: _look(draw, judges, part))
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
    columns |= {_FIGURE + name: values for name, values in judges.figures(from_bytes(images), batch)}
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
