"""Guidance of what a training draws: checked before it begins; its guide is read once, or is one of its averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from ldm.errors import ConfigError, UserError, shown
from ldm.models.guidance import Guidance, average_of
from ldm.training.latent_diffusion import DiffusionTraining

_RAW = "raw"


class LiveGuidance:
    """Guide the samples of a model in training; a guide `ema:NAME` is an average as the training has it by then.

    `place`: where a config sets it, for messages.
    """

    def __init__(self, guidance: Guidance, place: str) -> None:
        self.guidance, self.place = guidance, place

    @property
    def has_guide(self) -> bool:
        """Whether another model, or another average, is guided away from."""
        return self.guidance.guide is not None

    def check(self, module: DiffusionTraining) -> None:
        """Read a guide from its files. UserError for guidance that the model in training cannot have."""
        with self._named():
            if (name := average_of(self.guidance.guide)) is not None:
                _check_kept(module, name)
                return
            if self.has_guide:
                self.guidance = self.guidance.read("cpu")
            self.guidance.check(module.model)

    def warn_if_untrained(self, module: DiffusionTraining) -> None:
        """Warn where conditions are never dropped in the training."""
        self.guidance.warn_if_untrained(module.model)

    def ready(self, module: DiffusionTraining) -> Guidance:
        """Return the guidance with its guide as it is now; call it outside of `ema_scope`. Raises UserError."""
        with self._named():
            if (name := average_of(self.guidance.guide)) is not None:
                _check_kept(module, name)
                return replace(self.guidance, guide=module.model.with_weights(_weights(module, name)))
            self.guidance = self.guidance.ready(module.model)
        return self.guidance

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise ConfigError(str(error), self.place) from error


def _check_kept(module: DiffusionTraining, name: str) -> None:
    """Raise UserError unless a training has these weights beside those that samples are drawn with."""
    kept = [*([] if module.model_ema is None else [_RAW]), *module.averages]
    if name not in kept:
        use = f"use {' or '.join(f'ema:{one}' for one in kept)}, or " if kept else ""
        raise UserError(
            f"guide ema:{shown(name)}: names no other average of the training; {use}add it to training.params.averages"
        )


def _weights(module: DiffusionTraining, name: str) -> dict[str, Tensor]:
    """Return the weights of an average, or the raw ones, by the names of the parameters of the network."""
    parameters = dict(module.averaged.named_parameters())
    if name == _RAW:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {key: value.to(parameters[key].dtype) for key, value in module.averages[name].named_averages().items()}
