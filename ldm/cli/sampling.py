"""What the scripts that draw do once they know their conditions: load, draw, write."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ldm.cli.common import AS_TRAINED, PRECISIONS, choose_device, choose_sampler, count_steps, model_source, progress
from ldm.conditioning.base import Conditioner
from ldm.data.core.pixels import to_bytes_truncated
from ldm.errors import UserError
from ldm.images import GRID_LIMIT, ImageWriter
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.generate import Known, Request, generate
from ldm.models.loading import LoadedModel, load_model
from ldm.models.tiled import TiledAutoencoder, TiledNetwork
from ldm.sampling.base import Sampler

_log = logging.getLogger(__name__)


def keep_bytes(image: Tensor) -> Tensor:
    """Leave a picture as it is."""
    return image


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Drawing:
    """Describe one picture to draw.

    size: (height, width); conditions: batch key -> the entry of this picture; details: for the record; name: of its
    file, without it pictures are numbered; beside: bytes (C, H, W) to show left of it in the grid; known: image
    (C, H, W) in [-1, 1] and mask (1, H, W), above 0 in the hole, for models that do not know holes; finish: what
    happens to its bytes (C, H, W) before they are written.
    """

    size: tuple[int, int]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    beside: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None
    finish: Callable[[Tensor], Tensor] = keep_bytes


def load_for_sampling(
    options: argparse.Namespace, contexts_differ: bool = False, overrides: Sequence[str] = ()
) -> tuple[LoadedModel, Sampler]:
    """Load the model and make the sampler, the cheap mistakes first; --tile cuts the model's work into tiles.

    contexts_differ: each tile of the denoiser has a context of its own, see `TiledNetwork`. overrides: of the config,
    see `load_model`.
    """
    sampler, device = choose_sampler(options), choose_device(options.device)
    loaded = load_model(model_source(options), device, overrides)
    count_steps(sampler, loaded.model.process)
    if options.tile is not None:
        _tile(loaded, options.tile, contexts_differ)
    return loaded, sampler


def _tile(loaded: LoadedModel, side: int, contexts_differ: bool) -> None:
    """Let first stage and denoiser work on tiles of `side` pixels, or of the size that they were trained with."""
    multiple, model = loaded.model.side_multiple, loaded.model
    if side == AS_TRAINED:
        side = -(-max(loaded.trained_size()) // multiple) * multiple
    if side < multiple or side % multiple:
        raise UserError(f"--tile {side}: tiles of this model need a side that is a multiple of {multiple} pixels")
    positions = side // model.first_stage_model.factor
    model.model = TiledNetwork(model.model, positions, contexts_differ)
    if not isinstance(model.first_stage_model, IdentityAutoencoder):
        model.first_stage_model = TiledAutoencoder(model.first_stage_model, positions)
        if model.cond_stage_model is not None:
            model.cond_stage_model.use_first_stage(model.first_stage_model)


def conditioners(loaded: LoadedModel) -> list[Conditioner]:
    """List what conditions a model."""
    stage = loaded.model.cond_stage_model
    return [] if stage is None else [module for module in stage.modules() if isinstance(module, Conditioner)]


def only_conditioner(loaded: LoadedModel, kinds: type | tuple[type, ...], needed: str) -> Any:
    """Return the one conditioner of a model. UserError, with what is `needed`, unless it is of one of these kinds."""
    known = conditioners(loaded)
    if len(known) != 1 or not isinstance(known[0], kinds):
        found = ", ".join(f"{type(module).__name__} of '{module.key}'" for module in known) or "nothing"
        raise UserError(f"{loaded.config}: this model is conditioned on {found}; {needed}")
    return known[0]


def draw_into_folder(
    loaded: LoadedModel, sampler: Sampler, options: argparse.Namespace, conditions: dict[str, Sequence[Any]], count: int
) -> None:
    """Draw `count` samples, seeded one after the other from --seed, and write them into --outdir with their record."""
    size = picture_size(loaded, options)
    entries = ({key: column[i] for key, column in conditions.items()} for i in range(count))
    draw_all(loaded, sampler, options, (Drawing(size, entry, details=entry) for entry in entries), count)


def picture_size(loaded: LoadedModel, options: argparse.Namespace) -> tuple[int, int]:
    """Give (height, width) as asked for, or as trained."""
    height, width = loaded.trained_size() if None in (options.H, options.W) else (options.H, options.W)
    return height if options.H is None else options.H, width if options.W is None else options.W


def draw_all(
    loaded: LoadedModel, sampler: Sampler, options: argparse.Namespace, drawings: Iterable[Drawing], count: int
) -> None:
    """Draw `count` pictures, or fewer if there are not so many drawings; neighbours of one size share a batch.

    Their seeds count on from --seed. Pictures and their record go to --outdir, also if it is interrupted.
    """
    if count < 1:
        raise UserError(f"{count} samples asked for; use 1 or more")
    batch_size = min(count, options.columns) if options.batch_size is None else options.batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size: batch_size is {batch_size}; use 1 or more")
    warn_of_untrained_guidance(loaded, options)
    batches = _batches(drawings, batch_size)
    first = next(batches)
    loaded.model.first_stage_model.latent_shape(*first[0].size)  # before the folder, so that it leaves nothing behind
    grid_limit = 0 if options.skip_grid else GRID_LIMIT
    folder, start = ImageWriter(options.outdir, options.columns, grid_limit), time.monotonic()
    try:
        with progress(count * count_steps(sampler, loaded.model.process), "sampling") as bar:
            for batch in chain([first], batches):
                request = _request(batch, options.seed + len(folder.entries), options)
                for part in generate(loaded.model, sampler, request, on_step=lambda step: bar.update(len(step.x))):
                    _write(folder, batch, to_bytes_truncated(part.images).cpu(), part.seeds)
    finally:  # what was drawn before an interruption gets its record too
        seconds, done = time.monotonic() - start, len(folder.entries)
        if done:
            made = {"size": list(first[0].size), "batch_size": batch_size}
            record = folder.finish({**_record(loaded, sampler, options), **made})
            _log.info("wrote %d pictures (%.2f a second) and %s", done, done / seconds, record)


def _batches(drawings: Iterable[Drawing], batch_size: int) -> Iterator[list[Drawing]]:
    """Gather neighbours of one size that are conditioned alike."""
    batch: list[Drawing] = []
    for drawing in drawings:
        if batch and (len(batch) == batch_size or drawing.size != batch[0].size):
            yield batch
            batch = []
        batch.append(drawing)
    if batch:
        yield batch


def _request(batch: Sequence[Drawing], seed: int, options: argparse.Namespace) -> Request:
    conditions = {key: _collated([drawing.conditions[key] for drawing in batch]) for key in batch[0].conditions}
    known = None
    if batch[0].known is not None:
        known = Known(*map(torch.stack, zip(*(drawing.known for drawing in batch), strict=True)))
    seeds = range(seed, seed + len(batch))
    return Request(
        seeds, batch[0].size, conditions, options.scale, len(batch), PRECISIONS[options.precision], known=known
    )


def _collated(entries: list[Any]) -> list[Any] | Tensor:
    return torch.stack(entries) if isinstance(entries[0], Tensor) else entries


def _write(folder: ImageWriter, batch: Sequence[Drawing], images: Tensor, seeds: Sequence[int]) -> None:
    for drawing, image, seed in zip(batch, images, seeds, strict=True):
        folder.add(drawing.finish(image), {"seed": seed, **drawing.details}, drawing.name, drawing.beside)


def warn_of_untrained_guidance(loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Warn where --scale asks for guidance of a model that never saw 'no condition'."""
    stage = loaded.model.cond_stage_model
    if options.run and options.scale != 1.0 and stage is not None:
        rates = [stage.drop_rate, *(conditioner.drop_rate for conditioner in conditioners(loaded))]
        if not any(rates):
            message = "--scale %g: guidance may harm, this model has drop_rate 0, so 'no condition' is new to it"
            _log.warning(message, options.scale)


def _record(loaded: LoadedModel, sampler: Sampler, options: argparse.Namespace) -> dict[str, Any]:
    device = loaded.model.device
    settings = {name: getattr(value, "__name__", value) for name, value in asdict(sampler).items()}
    return {
        **loaded.provenance(),
        "sampler": {"name": type(sampler).__name__, **settings},
        "scale": options.scale,
        "precision": options.precision,
        "tile": options.tile,
        "device": getattr(torch.get_device_module(device), "get_device_name", str)(device),
    }
