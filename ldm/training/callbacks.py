"""Pictures during training, written to the run folder and to the loggers that can show them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import nn

from ldm.bounds import Count
from ldm.errors import UserError
from ldm.images import image_grid, to_pil, to_rgb_bytes
from ldm.models.guidance import Guidance
from ldm.sampling.base import Sampler
from ldm.sampling.ddim import DDIM
from ldm.training.latent_diffusion import DiffusionTraining
from ldm.training.live_guidance import LiveGuidance
from ldm.training.loggers import log_image
from ldm.training.previews import ROW_COLUMNS, PreviewOptions, previews
from ldm.training.randomness import PREVIEW, Draws
from ldm.training.strategies import whole_weights
from ldm.writing import replacing, write_text

_log = logging.getLogger(__name__)
_GRID_COLUMNS = 4


@runtime_checkable
class DrawsSamples(Protocol):
    """A callback that draws samples, and can tell before a training whether it will be able to."""

    def check_samples(self, module: nn.Module) -> None:
        """Raise UserError for samples that the model in training cannot draw."""


def chosen_guidance(name: str, scale: float | None, guidance: Guidance | None) -> LiveGuidance | None:
    """Return the guidance of a callback that takes a scale or a whole one. UserError if it is given both."""
    if scale is not None and guidance is not None:
        raise UserError(f"{name}: guidance_scale and guidance are both given; leave guidance_scale out")
    place = f"lightning.callbacks.{name}.params"
    if guidance is not None:
        return LiveGuidance(guidance, f"{place}.guidance")
    return None if scale is None else LiveGuidance(Guidance(scale), f"{place}.guidance_scale")


class ImageLogger(pl.Callback):
    """Write pictures of a training batch every `every_n_steps` optimiser steps and of the first validation batch.

    `early_steps` adds steps 1, 2, 4, ... below the interval, `first_step` the start. `sampler` (DDIM with 50 steps) and
    `guidance_scale` (None: no guided samples), or a whole `guidance`, say how a diffusion model is sampled. A guide may
    be an average of the training, `ema:NAME`. Files are named {train,val}/{name}_gs-{step}_e-{epoch}_b-{batch}.png in
    `directory`; captions of the batch go to a text beside them.
    """

    def __init__(
        self,
        directory: str | Path,
        every_n_steps: Count = 750,
        max_images: Count = 4,
        early_steps: bool = False,
        first_step: bool = False,
        sampler: Sampler | None = None,
        guidance_scale: float | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.every_n_steps, self.max_images, self.first_step = every_n_steps, max_images, first_step
        self.options = PreviewOptions(sampler or DDIM(), chosen_guidance("image_logger", guidance_scale, guidance))
        powers = (2**exponent for exponent in range(every_n_steps.bit_length()))
        self._early = {step for step in powers if step < every_n_steps} if early_steps else set()
        self._seen: dict[str, int] = {}

    def check_samples(self, module: nn.Module) -> None:
        """Raise UserError for more steps than the process of a model has, and for guidance that it cannot have."""
        if not isinstance(module, DiffusionTraining):
            return
        try:
            self.options.sampler.times(module.model.process)
        except UserError as error:
            raise UserError(f"lightning.callbacks.image_logger: {error}; set its sampler, or make it null") from error
        if self.options.guides(module.model):
            self.options.guidance.check(module)
            self.options.guidance.warn_if_untrained(module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check guidance again, now that the latent scale is known."""
        if isinstance(pl_module, DiffusionTraining) and self.options.guides(pl_module.model):
            self.options.guidance.check(pl_module)

    def _is_due(self, step: int) -> bool:
        return step % self.every_n_steps == 0 or step in self._early

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the pictures of the start, if they are asked for."""
        if self.first_step and trainer.global_step == 0:
            self._write(trainer, pl_module, batch, batch_idx, "train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the pictures of a training batch when they are due."""
        if trainer.global_step > 0 and self._is_due(trainer.global_step):
            self._write(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pictures of the first validation batch."""
        if batch_idx == 0 and dataloader_idx == 0 and not trainer.sanity_checking:
            self._write(trainer, pl_module, batch, batch_idx, "val")

    def _write(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Mapping[str, Any], batch_idx: int, split: str
    ) -> None:
        if self._seen.get(split) == trainer.global_step:
            return  # once per optimiser step, not once per accumulated batch
        self._seen[split] = trainer.global_step
        with whole_weights(trainer):
            if trainer.is_global_zero:
                try:
                    self._draw(trainer, module, batch, batch_idx, split)
                except OSError as error:  # as a checkpoint that cannot be written: the training is worth more
                    _log.warning("images of step %d could not be written: %s", trainer.global_step, error)

    def _draw(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Mapping[str, Any], batch_idx: int, split: str
    ) -> None:
        batch = {key: value[: self.max_images] for key, value in batch.items()}
        draws = Draws.keyed(module.device, PREVIEW)  # the same noise each time, so that progress can be seen
        with torch.no_grad(), evaluating(module), trainer.precision_plugin.forward_context():
            pictures = previews(module, batch, draws, self.options)
        place = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        folder = self.directory / split
        folder.mkdir(parents=True, exist_ok=True)
        for name, images in pictures.items():
            shown = image_grid(to_rgb_bytes(images), ROW_COLUMNS if name.endswith("_row") else _GRID_COLUMNS)
            with replacing(folder / f"{name}_{place}.png") as beside:
                to_pil(shown).save(beside)
            for logger in trainer.loggers:
                log_image(logger, f"{split}/{name}", rearrange(shown, "c h w -> h w c").numpy(), trainer.global_step)
        captions = [value for value in batch.values() if isinstance(value, list) and isinstance(value[0], str)]
        if captions:
            lines = [" | ".join(texts) for texts in zip(*captions, strict=True)]
            write_text(folder / f"captions_{place}.txt", "\n".join(lines) + "\n")


def check_previews(callbacks: Iterable[pl.Callback], module: nn.Module) -> None:
    """Raise UserError if one of the callbacks could not draw its samples."""
    for callback in callbacks:
        if isinstance(callback, DrawsSamples):
            callback.check_samples(module)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block in eval mode and give every submodule its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
