"""What the programs that sample do once they know their conditions: load the model, draw images, write them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ldm.cli.options import AS_TRAINED, PRECISIONS, SamplingOptions, progress
from ldm.conditioning.text import CLIPTextConditioner, TextConditioner
from ldm.data.core.pixels import to_bytes, to_bytes_truncated
from ldm.errors import UserError
from ldm.images import GRID_LIMIT, ImageWriter
from ldm.models.generate import Request, generate
from ldm.models.inpainting import InpaintingTarget
from ldm.models.loading import LoadedModel, load_model
from ldm.models.tiled import tile
from ldm.sampling.base import Sampler, identity

_log = logging.getLogger(__name__)
_PUBLISHED_GRIDS = ("compvis", "compvis_quad")  # samples on these are compared with published ones


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class ImageRequest:
    """One image to draw, and the file that it becomes.

    Args:
        size: (height, width).
        conditions: Batch key -> the entry of this image.
        details: Further entries of the record.
        name: Name of the file; without it images are numbered.
        source: Bytes (C, H, W) that are shown left of the image in the grid.
        target: Image (C, H, W) in [-1, 1] and mask (1, H, W), above 0 in the hole, for models without a mask.
        image: Image (C, H, W) in [-1, 1] to start from instead of from noise.
        negative: Like `conditions`, to be guided away from.
        finish: What happens to the bytes (C, H, W) of the image before they are written.
    """

    size: tuple[int, int]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    source: Tensor | None = None
    target: tuple[Tensor, Tensor] | None = None
    image: Tensor | None = None
    negative: Mapping[str, Any] | None = None
    finish: Callable[[Tensor], Tensor] = identity


def load_for_sampling(options: SamplingOptions, overrides: Sequence[str] = ()) -> LoadedModel:
    """Load the model, with overrides `model.key=value` of its config; --tile cuts its work into tiles.

    UserError also for steps or a grid that the model's process does not have.
    """
    loaded = load_model(options.model.source, options.model.device, overrides)
    options.sampler.times(loaded.model.process)
    if options.model.tile is None:
        return loaded
    return replace(loaded, model=tile(loaded.model, tile_side(loaded, options.model.tile)))


def tile_side(loaded: LoadedModel, asked: int) -> int:
    """Return the side of tiles in pixels: as asked for, or that of the training images, rounded up for the model."""
    multiple = loaded.model.side_multiple
    return -(-max(loaded.trained_size()) // multiple) * multiple if asked == AS_TRAINED else asked


def require_conditioner(loaded: LoadedModel, kinds: type | tuple[type, ...], needed: str) -> Any:
    """Return the one conditioner of a model. UserError, with what is `needed`, unless it is of one of these kinds."""
    known = list(loaded.model.conditioners())
    if len(known) != 1 or not isinstance(known[0], kinds):
        found = ", ".join(f"{type(module).__name__} of '{module.key}'" for module in known) or "nothing"
        raise UserError(f"{loaded.config}: this model is conditioned on {found}; {needed}")
    return known[0]


def text_keys(loaded: LoadedModel) -> list[str]:
    """Return the batch keys of the texts that a model is conditioned on, perhaps none."""
    kinds = (TextConditioner, CLIPTextConditioner)
    return [module.key for module in loaded.model.conditioners() if isinstance(module, kinds)]


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
        loaded.warn_of_untrained_guidance(options.guidance)
    batches = _batches((request for request in requests for _ in range(copies)), batch_size)
    first = next(batches)
    model.first_stage_model.latent_shape(*first[0].size)  # before the folder, so that it leaves nothing behind
    as_bytes = to_bytes_truncated if getattr(sampler, "grid", None) in _PUBLISHED_GRIDS else to_bytes
    folder = ImageWriter(options.outdir, columns, GRID_LIMIT if options.has_grid else 0)
    start, steps = time.monotonic(), len(sampler.times(model.process)) - 1
    try:
        with progress(count * steps, "sampling") as bar:
            for batch in chain([first], batches):
                request = _request(batch, options.seed + len(folder.entries), options)
                for images in generate(model, sampler, request, on_step=lambda step: bar.update(len(step.x))):
                    _write(folder, batch, as_bytes(images).cpu(), request.seeds)
    finally:
        seconds, done = time.monotonic() - start, len(folder.entries)
        if done:
            made = {"size": list(first[0].size), "batch_size": batch_size}
            record = folder.finish({**_record(loaded, sampler, options), **made})
            _log.info("wrote %d images (%.2f a second) and %s", done, done / seconds, record)


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


def _request(batch: Sequence[ImageRequest], seed: int, options: SamplingOptions) -> Request:
    first, target = batch[0], None
    conditions = {key: _collated([each.conditions[key] for each in batch]) for key in first.conditions}
    negative = first.negative and {key: _collated([each.negative[key] for each in batch]) for key in first.negative}
    images = None if first.image is None else torch.stack([each.image for each in batch])
    if first.target is not None:
        target = InpaintingTarget(*map(torch.stack, zip(*(each.target for each in batch), strict=True)))
    seeds, autocast = range(seed, seed + len(batch)), PRECISIONS[options.precision]
    how = (options.guidance, len(batch), autocast, target, images, negative)
    return Request(seeds, first.size, conditions, *how)


def _collated(entries: list[Any]) -> list[Any] | Tensor:
    return torch.stack(entries) if isinstance(entries[0], Tensor) else entries


def _write(folder: ImageWriter, batch: Sequence[ImageRequest], images: Tensor, seeds: Sequence[int]) -> None:
    for request, image, seed in zip(batch, images, seeds, strict=True):
        folder.add(request.finish(image), {"seed": seed, **request.details}, request.name, request.source)


def _record(loaded: LoadedModel, sampler: Sampler, options: SamplingOptions) -> dict[str, Any]:
    device = loaded.model.device
    return {
        **loaded.provenance(),
        "sampler": {"name": type(sampler).__name__, **asdict(sampler)},
        "scale": options.guidance,
        "precision": options.precision,
        "tile": options.model.tile,
        "device": getattr(torch.get_device_module(device), "get_device_name", str)(device),
    }
