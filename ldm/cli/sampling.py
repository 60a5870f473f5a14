"""What txt2img and sample do once they know their conditions: load, draw, write."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ldm.cli.common import PRECISIONS, choose_device, choose_sampler, count_steps, progress
from ldm.cli.models import LoadedModel, load_model
from ldm.cli.pictures import PictureFolder
from ldm.conditioning.base import Conditioner
from ldm.errors import UserError
from ldm.evaluation.generate import Request, generate
from ldm.sampling.base import Sampler

_log = logging.getLogger(__name__)


def load_for_sampling(options: argparse.Namespace) -> tuple[LoadedModel, Sampler]:
    """Load the model and make the sampler, the cheap mistakes first."""
    sampler, device = choose_sampler(options), choose_device(options.device)
    loaded = load_model(options, device)
    count_steps(sampler, loaded.model.schedule)
    return loaded, sampler


def conditioners(loaded: LoadedModel) -> list[Conditioner]:
    """List what conditions a model."""
    stage = loaded.model.cond_stage_model
    return [] if stage is None else [module for module in stage.modules() if isinstance(module, Conditioner)]


def draw_into_folder(
    loaded: LoadedModel, sampler: Sampler, options: argparse.Namespace, conditions: dict[str, Sequence[Any]], count: int
) -> None:
    """Draw `count` samples, seeded one after the other from --seed, and write them into --outdir with their record."""
    request = _request(loaded, options, conditions, count)
    _warn_of_untrained_guidance(loaded, options)
    batches = -(-count // request.batch_size)
    total = batches * count_steps(sampler, loaded.model.schedule)
    # made before the folder is, so that a mistake leaves nothing behind
    drawn = generate(loaded.model, sampler, request, on_step=lambda step: bar.update())
    folder, start = PictureFolder(options.outdir, columns=options.columns), time.monotonic()
    try:
        with progress(total, "sampling") as bar:
            for part in drawn:
                details = [
                    {"seed": seed, **{key: entries[part.first + i] for key, entries in conditions.items()}}
                    for i, seed in enumerate(part.seeds)
                ]
                folder.add(part.images, details)
    finally:  # what was drawn before an interruption gets its record too
        seconds, done = time.monotonic() - start, len(folder.entries)
        if done:
            record = folder.finish(_record(loaded, sampler, options, request))
            _log.info("wrote %d pictures (%.2f a second) and %s", done, done / seconds, record)


def _request(
    loaded: LoadedModel, options: argparse.Namespace, conditions: dict[str, Sequence[Any]], count: int
) -> Request:
    if count < 1:
        raise UserError(f"{count} samples asked for; use 1 or more")
    height, width = loaded.trained_size() if None in (options.H, options.W) else (options.H, options.W)
    size = (height if options.H is None else options.H, width if options.W is None else options.W)
    seeds = range(options.seed, options.seed + count)
    batch_size = min(count, options.columns) if options.batch_size is None else options.batch_size
    return Request(seeds, size, conditions, options.scale, batch_size, PRECISIONS[options.precision])


def _warn_of_untrained_guidance(loaded: LoadedModel, options: argparse.Namespace) -> None:
    stage = loaded.model.cond_stage_model
    if options.run and options.scale != 1.0 and stage is not None:
        rates = [stage.drop_rate, *(conditioner.drop_rate for conditioner in conditioners(loaded))]
        if not any(rates):
            message = "--scale %g: guidance may harm, this model has drop_rate 0, so 'no condition' is new to it"
            _log.warning(message, options.scale)


def _record(
    loaded: LoadedModel, sampler: Sampler, options: argparse.Namespace, request: Request
) -> dict[str, Any]:
    device = loaded.model.device
    settings = {name: getattr(value, "__name__", value) for name, value in asdict(sampler).items()}
    return {
        **loaded.provenance(),
        "sampler": {"name": type(sampler).__name__, **settings},
        "scale": request.scale,
        "size": list(request.size),
        "batch_size": request.batch_size,
        "precision": options.precision,
        "device": getattr(torch.get_device_module(device), "get_device_name", str)(device),
    }
