"""Encode the training set once, before training, where `lightning.cache_latents` asks for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ldm.data.core.latents import CachedLatents
from ldm.data.core.module import DataModule
from ldm.errors import ConfigError, UserError
from ldm.models.latent_diffusion import LatentDiffusion
from ldm.training.devices import Devices
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.lightning_fixes.signals import leave_signals_to_us
from ldm.training.module import TrainingModule

_log = logging.getLogger(__name__)
_PATH = "lightning.cache_latents"


@dataclass(frozen=True)
class CacheSettings:
    """Number of views (random crops and flips) of each image that are kept, and whether in half precision."""

    views: int = 1
    half: bool = False

    @classmethod
    def of(cls, value: Any) -> CacheSettings | None:
        """Return the settings in `true`, `false` (None) or a mapping with views and half. Raises ConfigError."""
        if not value:
            return None
        if value is True:
            return cls()
        if not isinstance(value, Mapping) or set(value) - {"views", "half"} or value.get("views", 1) < 1:
            raise ConfigError(f"{value!r} is not understood; write true, or {{views: 4, half: true}}", _PATH)
        return cls(**value)


def cached(data: DataModule, model: TrainingModule, settings: CacheSettings, devices: Devices) -> DataModule:
    """Return the same data with the training set replaced by the outputs of the model's frozen encoder."""
    if not isinstance(model, DiffusionTraining):
        raise ConfigError("only a latent diffusion model has a frozen encoder", _PATH)
    if isinstance(data.train, IterableDataset):
        raise UserError(f"{_PATH}: a stream cannot be kept in memory; leave it out")
    _log.info("encoding %d images, %d views of each", len(data.train), settings.views)
    latents = CachedLatents.of_batches(list(_encoded(data, model.model, settings, _device(devices))))
    _log.info("latents: %d, %.0f MiB", len(latents), latents.moments.nbytes / 2**20)
    options = {"num_workers": 0, "shuffle": data.shuffle, "drop_last": data.drop_last, "seed": data.seed}
    return DataModule(data.batch_size, latents, data.validation, data.test, **options)


@torch.no_grad()
def _encoded(
    data: DataModule, model: LatentDiffusion, settings: CacheSettings, device: torch.device
) -> Iterator[dict[str, Any]]:
    ordered = DataModule(
        data.batch_size, data.train, num_workers=data.num_workers, shuffle=False, drop_last=False, seed=data.seed
    )
    loader = leave_signals_to_us(ordered.train_loader())
    autoencoder = model.first_stage_model.to(device)
    for view in range(settings.views):
        loader.set_epoch(view)
        for batch in loader:
            moments = autoencoder.moments(batch.pop(model.image_key).to(device)).cpu()
            yield {"moments": moments.half() if settings.half else moments, **batch}


def _device(devices: Devices) -> torch.device:
    """Return the device that this process will train on."""
    if devices.accelerator == "cpu":
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    index = devices.devices[rank] if isinstance(devices.devices, list) else rank
    return torch.device(torch.accelerator.current_accelerator().type, index)
