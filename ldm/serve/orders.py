"""What a visitor may ask to be drawn: every field with its limits, and how it is read from JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ldm.config.types import hints_of, mismatch
from ldm.diffusion.grids import grid_names
from ldm.errors import UserError, shown
from ldm.models.guidance import Guidance
from ldm.sampling import make_sampler, sampler_class, sampler_names, sampler_options
from ldm.sampling.base import Sampler
from ldm.serve.uploads import LARGEST_SIDE, Upload

LIMITS = {"count": 16, "steps": 1000, "prompt": 1000, "waiting": 32, "side": LARGEST_SIDE}
CONDITIONS = ("prompt", "negative", "label", "layout", "map", "image", "mask", "item")  # not all models take all
_UPLOADS = ("image", "mask", "map")
_SET_ELSEWHERE = ("steps", "grid", "start")  # fields of samplers


@dataclass(frozen=True)
class Order:
    """What to draw, and how; checked against LIMITS when it is made. UserError names what is wrong.

    Args:
        layout: Objects, each {"label": 3, "box": [left, top, width, height]} in fractions of the image.
        map: A map of class indices.
        image: What to start from, to fill, or to enlarge, as the model has it.
        mask: The hole of `image`.
        item: Number of an item of the validation data, whose conditions are taken.
        options: Further options of the sampler, such as eta.
        weights: Which weights of the checkpoint: ema, raw, or the name of another average.
        height, width: Of the images, None as in training.
        tile: Whether to work on tiles of the size of the training images.
    """

    prompt: str = ""
    negative: str = ""
    label: int | None = None
    layout: Sequence[Mapping[str, Any]] = ()
    map: Upload | None = None
    image: Upload | None = None
    mask: Upload | None = None
    item: int | None = None
    count: int = 4
    steps: int = 20
    seed: int = 0
    sampler: str = "ddim"
    options: Mapping[str, float | bool] = field(default_factory=dict)
    grid: str = ""
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    apg_eta: float = 1.0
    apg_norm: float | None = None
    apg_momentum: float = 0.0
    strength: float = 0.75
    weights: str = "ema"
    height: int | None = None
    width: int | None = None
    tile: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "steps"):
            if not 1 <= getattr(self, name) <= LIMITS[name]:
                raise UserError(f"{name}: {getattr(self, name)} is not between 1 and {LIMITS[name]}")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None and not 1 <= side <= LIMITS["side"]:
                raise UserError(f"{name}: {side} is not between 1 and {LIMITS['side']}")
        for name in ("prompt", "negative"):
            if len(getattr(self, name)) > LIMITS["prompt"]:
                raise UserError(f"{name}: {len(getattr(self, name))} characters; at most {LIMITS['prompt']} are taken")
        if not 0 <= self.seed < 2**53:
            raise UserError(f"seed: {self.seed} is not between 0 and 2^53 - 1")
        if not -100 <= self.guidance <= 100:
            raise UserError(f"guidance: {self.guidance:g} is not between -100 and 100")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength: {self.strength:g} is not above 0 and at most 1")
        if self.sampler not in sampler_names():
            raise UserError(f"sampler: choose one of {', '.join(sampler_names())}")
        if self.grid and self.grid not in grid_names():
            raise UserError(f"grid: choose one of {', '.join(grid_names())}")
        if self.mask is not None and self.image is None:
            raise UserError("mask: a hole of which image? send one")
        self.how_guided()

    def given(self) -> list[str]:
        """Return the names of the conditions that were given."""
        return [name for name in CONDITIONS if getattr(self, name) not in ("", None, (), [])]

    def how_guided(self) -> Guidance:
        """Return the guidance. UserError for values that it cannot have."""
        norm = math.inf if self.apg_norm is None else self.apg_norm
        return Guidance(self.guidance, self.interval, self.rescale, self.apg_eta, norm, self.apg_momentum)

    def how_sampled(self) -> Sampler:
        """Return the sampler; ddpm takes all steps of the process. UserError for an option that it does not have."""
        hints = hints_of(sampler_class(self.sampler))
        for name, value in self.options.items():
            if problem := mismatch(value, hints.get(name, Any)):
                raise UserError(f"options: {shown(name)}: {problem}")
        if wrong := [name for name in self.options if name in _SET_ELSEWHERE]:
            raise UserError(f"options: {wrong[0]} is a field of its own")
        steps = None if self.sampler == "ddpm" else self.steps
        return make_sampler(self.sampler, steps=steps, grid=self.grid or None, **self.options)


def options_of(sampler: str) -> dict[str, float | bool | None]:
    """Return the options of a sampler that an order may set, with their defaults, None for infinite ones."""
    known = {one.name: one.default for one in fields(sampler_class(sampler))}
    known = {name: known[name] for name in sampler_options(sampler) if name not in _SET_ELSEWHERE}
    return {name: None if value == math.inf else value for name, value in known.items()}


def read_order(body: bytes) -> Order:
    """Read an order from JSON; files are texts `data:...;base64,...`. UserError names the field."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the order is no JSON") from error
    if not isinstance(given, dict):
        raise UserError("the order is no mapping")
    hints = hints_of(Order) | dict.fromkeys(_UPLOADS, str)
    known = [one.name for one in fields(Order)]
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{shown(str(name))}: unknown; an order has {', '.join(known)}")
        if problem := mismatch(value, hints[name]):
            raise UserError(f"{name}: {problem}")
    files = {name: Upload.of(name, given[name]) if given[name] else None for name in _UPLOADS if name in given}
    return Order(**given | files)
