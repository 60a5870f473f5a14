"""Which guidance a walk gets: one value for scripts, YAML and Python, and what it costs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.bounds import Fraction
from ldm.diffusion.guidance import Pair, extrapolated, extrapolation, guided, projected, rescaled, within
from ldm.diffusion.prediction import Denoise, Denoised
from ldm.diffusion.process import Process
from ldm.errors import UserError
from ldm.sampling.base import Sampler, last

if TYPE_CHECKING:
    from ldm.models.latent_diffusion import LatentDiffusion

_AVERAGE = "ema:"
_log = logging.getLogger(__name__)


def average_of(guide: Any) -> str | None:
    """Return NAME of a guide `ema:NAME`, another average of the model that is guided; None for any other guide."""
    is_average = isinstance(guide, str) and guide.startswith(_AVERAGE)
    return guide.removeprefix(_AVERAGE) if is_average else None


@dataclass(frozen=True)
class Guidance:
    """Guide by `scale` away from no condition, a negative one, or a weaker model; 1 is no guidance.

    UserError for values outside of their range, and for those that have no effect at scale 1.

    Args:
        scale: Of the extrapolation.
        interval: Where of the walk to guide, from 0 (noise) to 1 (data) in the time of the process.
        rescale: Share (phi) to which the result gets back the contrast of the conditional prediction.
        apg_eta: Share that is kept of what is parallel to the conditional prediction; 0 is adaptive projected guidance.
        apg_norm: Largest length (r) of the difference of the predictions, in one sample.
        apg_momentum: Share (beta) of former differences that is added; negative values push them away.
        guide: A run or checkpoint, or a model, that is guided away from under the same condition (autoguidance).
        negative: What is guided away from in place of no condition, for all samples: a text, for models of texts, or
            conditions by their keys.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: Fraction = 0.0
    apg_eta: float = 1.0
    apg_norm: float = math.inf
    apg_momentum: float = 0.0
    guide: Any = None  # whose types would import this room in a circle
    negative: str | Mapping[str, Any] | None = None
    loaded: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", tuple(self.interval))
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            given = ":".join(f"{end:g}" for end in self.interval)
            raise UserError(f"guidance: interval is {given}; use START:STOP with 0 <= START < STOP <= 1")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance: rescale is {self.rescale:g}; use 0 (off) to 1")
        if not self.apg_norm > 0:
            raise UserError(f"guidance: apg_norm is {self.apg_norm:g}; it is a length, above 0")
        for name in ("scale", "apg_eta", "apg_momentum"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"guidance: {name} is {getattr(self, name)}; use a number")
        if not self.is_on and (given := self._changed()):
            raise UserError(f"guidance: {', '.join(given)}: no effect at scale 1; give another scale")

    @staticmethod
    def of(guidance: Guidance | float) -> Guidance:
        """Accept a scale in place of the object."""
        return guidance if isinstance(guidance, Guidance) else Guidance(guidance)

    @classmethod
    def parse(
        cls, scale: float, options: Sequence[str] = (), guide: Any = None, negative: str | None = None
    ) -> Guidance:
        """Return the guidance of `NAME=value` options; an interval is START:STOP. UserError for others."""
        from ldm.pairs import pairs_of  # which only a command line needs

        given: dict[str, Any] = {}
        names = [one.name for one in fields(cls) if one.init and one.name not in ("scale", "guide", "negative")]
        for name, text in pairs_of(options, "guidance").items():
            option = f"{name}={text}"
            if name not in names:
                raise UserError(f"guidance {option}: unknown; use NAME=value with {', '.join(names)}")
            try:
                values = tuple(map(float, text.split(":")))
            except ValueError:
                values = ()
            if len(values) != (2 if name == "interval" else 1):
                form = "START:STOP, such as 0.2:0.8" if name == "interval" else "a number"
                raise UserError(f"guidance {option}: {name} is {form}")
            given[name] = values if name == "interval" else values[0]
        return cls(scale, guide=guide, negative=negative, **given)

    @property
    def is_on(self) -> bool:
        """Whether it changes predictions."""
        return self.scale != 1

    @property
    def is_linear(self) -> bool:
        """Whether it is plain classifier-free guidance."""
        return self.is_on and not self._changed()

    def _changed(self) -> list[str]:
        own = [one for one in fields(self) if one.init and one.name != "scale"]
        return [one.name for one in own if getattr(self, one.name) != one.default]

    def applied(self, pair: Pair, alone: Denoise, process: Process) -> Denoise:
        """Return the guided denoiser of one walk. `pair` predicts toward and away from; `alone` only toward."""
        rule = linear = extrapolation(self.scale)
        if (self.apg_eta, self.apg_norm, self.apg_momentum) != (1, math.inf, 0):
            rule = projected(rule, self.apg_eta, self.apg_norm, self.apg_momentum)
        if self.rescale:
            rule = rescaled(rule, self.rescale)
        denoise = extrapolated(pair, self.scale) if rule is linear else guided(pair, rule, process)
        if self.interval == (0, 1):
            return denoise
        start, stop = self.interval
        u = torch.tensor([1 - stop, 1 - start], dtype=torch.float64)
        earliest, latest = process.from_uniform(u).tolist()
        return within(denoise, alone, -math.inf if stop == 1 else earliest, math.inf if start == 0 else latest)

    def evaluations(self, sampler: Sampler, process: Process) -> int:
        """Return how many evaluations of a network each sample of a walk costs, those of a guide included."""
        count = 0

        def alone(x_t: Tensor, t: Tensor) -> Denoised:
            nonlocal count
            count += 1
            return Denoised(x_t, x_t)

        denoise = alone if not self.is_on else self.applied(lambda *at: (alone(*at), alone(*at)), alone, process)
        x = torch.arange(2.0).view(1, 1, 2, 1)  # which has a standard deviation, as rescaling asks for
        last(sampler(denoise, x, process, noise=torch.zeros))  # counted by walking without network
        return count

    # --- with a model ----------------------------------------------------------------------------------------------

    def ready(self, model: LatentDiffusion, has_negative: bool = False) -> Guidance:
        """Return the same with its guide loaded. UserError if the model or the guide cannot be guided so."""
        found = self if self.guide is None else self.read(model.device)
        found.check(model, has_negative)
        return found

    def read(self, device: torch.device | str) -> Guidance:
        """Return the same with its guide on a device, read from its files unless it was. UserError if it cannot be."""
        from ldm.models.loading import load_model, placed

        found = copy(self)
        if self.loaded is not None:
            placed(self.loaded.model, torch.device(device))
        elif not isinstance(self.guide, nn.Module):
            object.__setattr__(found, "loaded", load_model(self.guide, device))
        return found

    def check(self, model: LatentDiffusion, has_negative: bool = False) -> None:
        """Raise UserError if a model cannot be guided so; a guide must have been read."""
        if not self.is_on:
            return
        has_negative |= self.away_from(model, 1) is not None
        if self.guide is not None:
            if (problem := misfit(self.weaker, model)) is not None:
                place = "guide" if self.loaded is None else f"guide {self.loaded.checkpoint}"
                raise UserError(f"{place}: {problem}; use an earlier or smaller model of the same kind")
        elif model.cond_stage_model is None:
            raise UserError(f"guidance: scale {self.scale:g} on a model without condition; use 1, or give a guide")
        elif not has_negative:
            for part in model.conditioners():
                part.check_null()

    def warn_if_untrained(self, model: LatentDiffusion) -> None:
        """Warn where conditions were never dropped in training, so that guidance has nothing to extrapolate from."""
        is_plain = self.is_on and self.guide is None and self.negative is None and model.cond_stage_model is not None
        if is_plain and not model.drops_conditions:
            message = "guidance %g: may harm, as this model has drop_rate 0, so that 'no condition' is new to it"
            _log.warning(message, self.scale)

    @property
    def weaker(self) -> LatentDiffusion:
        """The model of a guide that is ready."""
        return self.guide if self.loaded is None else self.loaded.model

    @property
    def guides(self) -> list[LatentDiffusion]:
        """The models beside the guided one: that of a guide that is ready, or none."""
        return [] if self.guide is None else [self.weaker]

    def denoiser_of_guide(
        self, conditions: Mapping[str, Any], network: Callable[[LatentDiffusion], Any] = lambda model: None
    ) -> Denoise | None:
        """Return the denoiser of a guide that is ready, under these conditions; None without guide.

        network: what is called in place of the guide's own, if anything (see `LatentDiffusion.denoiser`).
        """
        if self.guide is None:
            return None
        return self.weaker.denoiser(self.weaker.condition(conditions), network=network(self.weaker))

    def away_from(self, model: LatentDiffusion, count: int) -> dict[str, list[Any]] | None:
        """Return the negative conditions of so many samples by their keys, None if there are none.

        UserError for those that the model does not have.
        """
        if self.negative is None:
            return None
        given = self.negative
        if isinstance(given, str):
            from ldm.conditioning.text import text_keys  # which few models need

            given = dict.fromkeys(text_keys(model.conditioners()), given)
            if not given:
                raise UserError("negative: this model is not conditioned on text; leave it out")
        keys = [part.key for part in model.conditioners()]
        if other := [key for key in given if key not in keys]:
            known = ", ".join(keys) or "none"
            raise UserError(f"negative: {other[0]}: the model has no such condition; it has {known}")
        return {key: [value] * count for key, value in given.items()}

    def record(self) -> float | dict[str, Any]:
        """Return the plain value that belongs beside samples: the scale alone if nothing else is set."""
        if not self._changed():
            return self.scale
        content = {name: getattr(self, name) for name in ("scale", *self._changed())}
        if self.guide is not None:
            content["guide"] = "given" if self.loaded is None else self.loaded.provenance()
        return content


def misfit(guide: LatentDiffusion, model: LatentDiffusion) -> str | None:
    """Return in which way the condition, the latents or the process of another model are not those of a model.

    On the meta device, and as long as a latent scale is not measured, what has no values is not compared.
    """
    keys, given = ({part.key for part in one.conditioners()} for one in (guide, model))
    if keys - given:
        return f"it is conditioned on {', '.join(sorted(keys - given))}, which the model is not"
    channels = [one.first_stage_model.latent_channels for one in (guide, model)]
    if channels[0] != channels[1]:
        return f"its latents have {channels[0]} channels, those of the model {channels[1]}"
    factors = [one.first_stage_model.factor for one in (guide, model)]
    if factors[0] != factors[1]:
        return f"its latents are 1/{factors[0]} of the image, those of the model 1/{factors[1]}"
    if model.device.type == "meta":
        return None
    if model.scale_is_known:
        scales = [float(one.scale_factor) for one in (guide, model)]
        if not math.isclose(*scales, rel_tol=1e-3):
            return f"its latent scale is {scales[0]:.5g}, that of the model {scales[1]:.5g}"
        if not torch.allclose(*(one.scaled(_probe(one)).cpu() for one in (guide, model)), rtol=1e-3, atol=1e-3):
            return "its latent scale has another mean or std of the channels"
    levels = [_some_levels(one.process) for one in (guide, model)]
    if levels[0].shape != levels[1].shape or not torch.allclose(*levels, rtol=1e-3, atol=1e-4):
        return "it has another process, whose times mean other noise"
    return None


def _probe(model: LatentDiffusion) -> Tensor:
    """Return latents of 0 and of 1, (2, c, 1, 1)."""
    return torch.tensor([0.0, 1.0], device=model.device)[:, None, None, None].expand(
        2, model.first_stage_model.latent_channels, 1, 1
    )


def _some_levels(process: Process) -> Tensor:
    """Return alpha and sigma at some times."""
    t = torch.linspace(process.cleanest, process.noisiest, 9, dtype=torch.float64)
    level = process.level(t)
    return torch.stack([level.alpha.flatten(), level.sigma.flatten()]).double().cpu()
