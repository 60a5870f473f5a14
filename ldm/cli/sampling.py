"""What the programs that sample do once they know their conditions: load the model, draw images, write them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ldm.cli.options import AS_TRAINED, PRECISIONS, SamplingOptions, progress
from ldm.data.core.pixels import to_bytes, to_bytes_truncated
from ldm.errors import UserError
from ldm.images import GRID_LIMIT, ImageWriter
from ldm.models.generate import generate
from ldm.models.image_request import ImageRequest, joined
from ldm.models.loading import LoadedModel, load_model
from ldm.models.tiled import tile
from ldm.networks.layers import store_in_half
from ldm.sampling.base import Sampler

_log = logging.getLogger(__name__)
_PUBLISHED_GRIDS = ("compvis", "compvis_quad")  # samples on these are compared with published ones


def load_for_sampling(options: SamplingOptions) -> LoadedModel:
    """Load the model, with the overrides of its config; --tile cuts its work into tiles.

    The weights of its network are stored in the half precision in which it computes.

    UserError also for steps or a grid that the model's process does not have.
    """
    loaded = load_model(options.model.source, options.model.device, options.overrides)
    options.sampler.times(loaded.model.process)
    if (dtype := PRECISIONS[options.precision]) is not None:
        store_in_half(loaded.model.model, dtype)
    if options.model.tile is None:
        return loaded
    return replace(loaded, model=tile(loaded.model, tile_side(loaded, options.model.tile)))


def tile_side(loaded: LoadedModel, asked: int) -> int:
    """Return the side of tiles in pixels: as asked for, or that of the training images, rounded up for the model."""
    return loaded.trained_tile() if asked == AS_TRAINED else asked


def require_conditioner(loaded: LoadedModel, kinds: type | tuple[type, ...], needed: str) -> Any:
    """Return the one conditioner of a model. UserError, with what is `needed`, unless it is of one of these kinds."""
    known = list(loaded.model.conditioners())
    if len(known) != 1 or not isinstance(known[0], kinds):
        found = ", ".join(f"{type(module).__name__} of '{module.key}'" for module in known) or "nothing"
        raise UserError(f"{loaded.config}: this model is conditioned on {found}; {needed}")
    return known[0]


def sample_into_folder(
    loaded: LoadedModel,
    requests: Iterable[ImageRequest],
    count: int,
    options: SamplingOptions,
    copies: int = 1,
    columns: int = 4,
) -> None:
    """Draw `copies` images of each of `count` requests, fewer if there are not so many, with a record and a grid.

    Neighbours of one size share a batch; seeds count on from --seed. What was drawn before an interruption is recorded.
    """
    model, sampler, count = loaded.model, options.sampler, count * copies
    batch_size = _batch_size(count, options.batch_size, columns)
    if options.model.source.run is not None:  # published configs do not say it
        options.guidance.warn_if_untrained(model)
    batches = _batches((request for request in requests for _ in range(copies)), batch_size)
    first = next(batches)
    model.first_stage_model.latent_shape(*first[0].size)  # before the folder, so that it leaves nothing behind
    options = replace(options, guidance=options.guidance.ready(model, first[0].negative is not None))
    evaluations = options.guidance.evaluations(sampler, model.process)
    as_bytes = to_bytes_truncated if getattr(sampler, "grid", None) in _PUBLISHED_GRIDS else to_bytes
    folder = ImageWriter(options.outdir, columns, GRID_LIMIT if options.has_grid else 0)
    start, steps = time.monotonic(), len(sampler.times(model.process)) - 1
    try:
        with progress(count * steps, "sampling") as bar:
            for batch in chain([first], batches):
                seed = options.seed + len(folder.entries)
                request = joined(batch, seed, options.guidance, PRECISIONS[options.precision])
                request = replace(request, graphs=options.graphs)
                for images in generate(model, sampler, request, on_step=lambda step: bar.update(len(step.x))):
                    _write(folder, batch, as_bytes(images).cpu(), request.seeds)
    finally:
        seconds, done = time.monotonic() - start, len(folder.entries)
        if done:
            made = {"size": list(first[0].size), "batch_size": batch_size, "evaluations_per_image": evaluations}
            record = folder.finish({**_record(loaded, sampler, options), **made})
            what = "wrote %d images (%.2f a second, %d network evaluations each) and %s"
            _log.info(what, done, done / seconds, evaluations, record)


def _batch_size(count: int, asked: int | None, columns: int) -> int:
    if count < 1:
        raise UserError(f"{count} samples asked for; use 1 or more")
    batch_size = min(count, columns) if asked is None else asked
    if batch_size < 1:
        raise UserError(f"--batch-size: batch_size is {batch_size}; use 1 or more")
    return batch_size


def _batches(requests: Iterable[ImageRequest], batch_size: int) -> Iterator[list[ImageRequest]]:
    """Gather neighbours of one size."""
    batch: list[ImageRequest] = []
    for request in requests:
        if batch and (len(batch) == batch_size or request.size != batch[0].size):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _write(folder: ImageWriter, batch: Sequence[ImageRequest], images: Tensor, seeds: Sequence[int]) -> None:
    for request, image, seed in zip(batch, images, seeds, strict=True):
        folder.add(request.finish(image), {"seed": seed, **request.details}, request.name, request.source)


def _record(loaded: LoadedModel, sampler: Sampler, options: SamplingOptions) -> dict[str, Any]:
    device = loaded.model.device
    return {
        **loaded.provenance(),
        "sampler": {"name": type(sampler).__name__, **asdict(sampler)},
        "scale": options.guidance.scale,
        "guidance": options.guidance.record(),
        "precision": options.precision,
        "tile": options.model.tile,
        "device": getattr(torch.get_device_module(device), "get_device_name", str)(device),
    }
